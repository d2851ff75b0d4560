"use strict";
const PLAIN = ["method", "bits", "model", "status"], CONFIG = "config.";
const collator = new Intl.Collator(undefined, { numeric: true });

// Facets: checkboxes of the values that a key has, for the plain keys and for any of the config that is asked for in
// `more`. What is checked goes to state.picked, a Set of values by key.
function filters(root, more, data, state, changed) {
  const all = () => [...root.children];
  const title = (key) => key.replace(CONFIG, "");

  function values(row, key) {
    if (!key.startsWith(CONFIG)) return [row[key]];
    return row.runs.map((i) => shown(data.runs[i].config[title(key)]));
  }

  function add(key) {
    const count = new Map();
    for (const value of data.rows.flatMap((row) => [...new Set(values(row, key))]))
      count.set(value, (count.get(value) ?? 0) + 1);
    const order = [...count].sort(([a], [b]) => collator.compare(a, b));
    const boxes = order.map(([value, n]) => make("label", {}, make("input", { type: "checkbox", value, name: key }),
      value, make("span", { className: "quiet" }, `${n}`)));
    const facet = make("details", { className: "facet", name: "facet" }, make("summary", {}, title(key)),
      make("fieldset", { ariaLabel: title(key) }, ...boxes));
    facet.dataset.key = key;
    facet.addEventListener("change", () => {
      const wanted = new Set([...facet.querySelectorAll(":checked")].map((box) => box.value));
      wanted.size ? state.picked.set(key, wanted) : state.picked.delete(key);
      label();
      changed();
    });
    root.append(facet);
    return facet;
  }

  const of = (key) => all().find((facet) => facet.dataset.key === key) ?? add(key);

  function label() {  // show what is picked, also of keys that a link brought
    [...state.picked.keys()].forEach(of);
    for (const facet of all()) {
      const { key } = facet.dataset, wanted = state.picked.get(key);
      const told = wanted ? `: ${[...wanted].join(", ")}` : "";
      facet.classList.toggle("picked", Boolean(wanted));
      facet.firstElementChild.textContent = title(key) + (told.length > 40 ? `${told.slice(0, 40)}…` : told);
      for (const box of facet.querySelectorAll("input")) box.checked = Boolean(wanted?.has(box.value));
    }
  }

  const close = (facet) => { facet.open = false; };
  document.addEventListener("keydown", (event) => {
    const open = event.key === "Escape" && all().find((facet) => facet.open);
    if (open) { close(open); open.firstElementChild.focus(); }
  });
  document.addEventListener("pointerdown",
    (event) => all().filter((facet) => !facet.contains(event.target)).forEach(close));
  more.addEventListener("change", () => {
    const facet = of(more.value);
    more.value = "";
    facet.open = true;
    facet.firstElementChild.focus();
  });
  more.append(...data.settings.map((key) => make("option", { value: CONFIG + key }, key)));
  more.parentElement.hidden = !data.settings.length;
  for (const key of PLAIN) if (new Set(data.rows.map((row) => row[key])).size > 1) add(key);

  return { values, label, knows: (key) => PLAIN.includes(key) || key.startsWith(CONFIG) };
}
