"use strict";
// The report as a tool: filters, order, a pinned baseline and points that say their name. All of it progressive: the
// table is complete without this script. What is chosen stands in the address, so that a view can be linked.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  const table = $("table"), body = table.tBodies[0];
  document.querySelectorAll(".beyond").forEach((each) => each.classList.remove("beyond"));
  const heads = [...table.tHead.rows[0].cells];
  const lines = [...body.rows], place = new Map(lines.map((line, i) => [line, i]));
  const marks = [...document.querySelectorAll("[data-row]")], folds = [...$("folds").children];
  const state = { sort: "", baseline: "", q: "", theme: "", all: "", picked: new Map() };

  // ---- Which rows are shown
  const facets = filters($("facets"), $("more"), data, state, changed);
  const texts = [];  // what the free text looks at, by place; emptied when a verdict changes
  const textOf = (i) => texts[i] ??= lines[i].textContent.toLowerCase();
  let kept = [];  // by place: whether a row passes all filters

  function apply() {
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean), picked = [...state.picked];
    kept = data.rows.map((row, i) => words.every((word) => textOf(i).includes(word))
      && picked.every(([key, wanted]) => facets.values(row, key).some((value) => wanted.has(value))));
    const passed = [...body.rows].filter((line) => kept[place.get(line)]);
    const first = new Set(passed.slice(0, state.all ? Infinity : data.most));
    data.rows.forEach((row, i) => {
      lines[i].hidden = !first.has(lines[i]);
      for (const run of row.runs) folds[run].hidden = lines[i].hidden;
    });
    for (const mark of marks) mark.classList.toggle("faded", !kept[mark.dataset.row]);
    for (const enter of roving) enter();
    tell(first.size);
  }

  function tell(size) {
    const rows = lines.filter((line, i) => kept[i]), count = {};
    for (const word of state.baseline ? rows.flatMap((line) => verdicts.map((at) => line.cells[at].textContent)) : [])
      if (word !== "–" && word !== "baseline") count[word] = (count[word] ?? 0) + 1;
    const told = Object.entries(count).map(([verdict, n]) => `${n} ${verdict}`).join(", ");
    $("told").textContent = `${rows.length} of ${lines.length} rows`
      + (state.baseline ? `; against ${nameOf(state.baseline)}: ${told || "nothing to compare"}.` : ".");
    $("all").parentElement.hidden = size === rows.length;
    $("beyond").textContent = `The table and the runs show the first ${size} of ${rows.length} rows.`;
  }

  // ---- Order
  const compare = (a, b) => typeof a === "number" ? a - b : collator.compare(a, b);
  function sort() {
    const descending = state.sort.startsWith("-"), key = state.sort.slice(descending ? 1 : 0);
    const at = heads.findIndex((head) => head.dataset.key === key), sign = descending ? -1 : 1;
    heads.forEach((head) => head.removeAttribute("aria-sort"));
    const numeric = heads[at]?.classList.contains("number");
    const keyed = lines.map((line, i) => {
      const text = at < 0 ? i : line.cells[at].dataset.sort ?? "";
      return [text === "" ? null : numeric ? Number(text) : text, line];
    });
    keyed.sort(([a], [b]) => a === null || b === null ? (a === null) - (b === null) : sign * compare(a, b));
    body.append(...keyed.map(([, line]) => line));
    heads[at]?.setAttribute("aria-sort", descending ? "descending" : "ascending");
  }

  // ---- The baseline: a method at each row's model and bits, or "@id", one row against all of its model
  const columns = Object.fromEntries(data.sets.map((set) => [set, ["ratio", "versus", "verdict"].map(
    (kind) => heads.findIndex((head) => head.dataset.key === `${kind}/${set}`))]).filter(([, at]) => at[1] >= 0));
  const verdicts = Object.values(columns).map((at) => at[2]);
  const isBase = (row) => state.baseline[0] === "@" ? row.id === state.baseline.slice(1)
    : row.method === state.baseline || row.name === state.baseline;
  const nameOf = (baseline) => data.rows.find((row) => `@${row.id}` === baseline)?.label ?? baseline;
  const paired = pairing(data);
  let queue = [];

  function pin() {
    table.classList.toggle("unpinned", !state.baseline);
    const bases = data.rows.filter((row) => row.status !== "failed" && isBase(row));
    queue = data.rows.flatMap((row, i) => {
      const base = row.status === "failed" ? undefined : bases.find((other) => other.model === row.model
        && (state.baseline[0] === "@" || other.float || other.bits === row.bits));
      lines[i].classList.toggle("base", row === base);
      lines[i].querySelector(".pin")?.setAttribute("aria-pressed", state.baseline === `@${row.id}`);
      return Object.keys(columns).map((set) => [i, set, base]);
    });
    hold(queue, []);
  }

  function hold(mine, found) {  // in slices, so that a thousand rows do not freeze the page
    const until = performance.now() + 40;
    for (let next; (next = mine[found.length]) && performance.now() < until;) {
      const [i, set, base] = next, row = data.rows[i];
      found.push(base && row !== base ? paired(row, base, set) : null);
    }
    if (queue !== mine) return;  // another baseline was chosen
    if (found.length < mine.length) {
      $("told").textContent = `Comparing: ${found.length} of ${mine.length} …`;
      setTimeout(hold, 0, mine, found);
      return;
    }
    found.forEach((difference, n) => write(...mine[n], difference));
    texts.length = 0;
    if (/^-?(ratio|versus|verdict)\//.test(state.sort)) sort();
    apply();
  }

  function write(i, set, base, found) {
    const row = data.rows[i], [ratio, versus, verdict] = columns[set].map((at) => lines[i].cells[at]);
    const [gap, its] = [row.gap[set], base?.gap[set]];
    put(ratio, its > 0 && typeof gap === "number" ? gap / its : null, (value) => `${value.toFixed(2)}×`);
    put(versus, found?.mean ?? null, (mean) => found.low === found.high ? signed(mean)
      : `${signed(mean)} [${signed(found.low)}, ${signed(found.high)}]`);
    versus.title = base ? `against ${base.label}` : "";
    const word = !base ? null : row === base ? "baseline" : !found ? "not paired"
      : found.high < 0 ? "better" : found.low > 0 ? "worse" : "undecided";
    put(verdict, word, (text) => text);
    verdict.className = `text pinned ${word ?? ""}`;
  }

  function put(cell, value, text) {
    cell.textContent = value === null ? "–" : text(value);
    value === null ? delete cell.dataset.sort : cell.dataset.sort = value;
  }
  const signed = (value) => (value < 0 ? "" : "+") + value.toFixed(4);

  // ---- Points of the figures, details of the runs
  const figures = [...document.querySelectorAll("figure:has(.point)")];
  const roving = [rove(body, ".pin"), ...figures.map((figure) => rove(figure, ".point"))];
  details($("folds"), data);
  hints($("tip"), (i) => !state.baseline ? "" : Object.entries(columns).map(([set, [, versus, verdict]]) =>
    `; ${lines[i].cells[verdict].textContent} ${lines[i].cells[versus].textContent} on ${set}`).join(""));

  // ---- The address
  function changed() {
    const hash = new URLSearchParams();
    for (const key of ["sort", "q", "theme", "all"]) if (state[key]) hash.set(key, state[key]);
    if (state.baseline !== data.baseline) hash.set("baseline", state.baseline);
    for (const [key, wanted] of state.picked) for (const value of wanted) hash.append(key, value);
    history.replaceState(null, "", `#${hash}`);
    apply();
  }

  function choose(baseline) {
    state.baseline = baseline;
    if (baseline && ![...$("baseline").options].some((option) => option.value === baseline))
      $("baseline").append(make("option", { value: baseline }, nameOf(baseline)));
    $("baseline").value = baseline;
    if (baseline || data.baseline || queue.length) pin();
  }

  function restore() {
    const hash = new URLSearchParams(location.hash.slice(1));
    for (const key of ["sort", "q", "theme", "all"]) state[key] = hash.get(key) ?? "";
    state.picked = new Map();
    for (const [key, value] of hash) if (facets.knows(key))
      state.picked.set(key, (state.picked.get(key) ?? new Set()).add(value));
    facets.label();
    $("search").value = state.q;
    show();
    sort();
    choose(hash.get("baseline") ?? data.baseline);
    apply();
  }

  function show() {
    document.documentElement.dataset.theme = state.theme;
    $("theme").value = state.theme;
  }

  // ---- Controls
  const methods = [...new Set(data.rows.filter((row) => row.status !== "failed").map((row) => row.method))];
  $("baseline").append(...methods.map((method) => make("option", { value: method }, method)));
  $("baseline").addEventListener("change", (event) => { choose(event.target.value); changed(); });
  $("search").addEventListener("input", (event) => { state.q = event.target.value; changed(); });
  $("theme").addEventListener("change", (event) => { state.theme = event.target.value; show(); changed(); });
  $("all").addEventListener("click", () => { state.all = "rows"; changed(); });
  $("reset").addEventListener("click", () => {
    Object.assign(state, { q: $("search").value = "", picked: new Map() });
    facets.label();
    changed();
  });
  heads.forEach((head) => head.firstElementChild.addEventListener("click", () => {
    state.sort = (head.getAttribute("aria-sort") === "ascending" ? "-" : "") + head.dataset.key;
    sort();
    changed();
  }));
  body.addEventListener("click", (event) => {
    const line = event.target.closest(".pin")?.closest("tr");
    if (!line) return;
    const id = `@${data.rows[place.get(line)].id}`;
    choose(state.baseline === id ? "" : id);
    changed();
  });
  document.querySelector("nav").addEventListener("click", (event) => {  // the address holds the view, not the place
    const target = document.querySelector(event.target.getAttribute("href") ?? "none");
    if (!target) return;
    event.preventDefault();
    target.tabIndex = -1;
    target.focus();
    target.scrollIntoView();
  });
  for (const each of document.querySelectorAll(".scripted")) each.hidden = false;
  addEventListener("hashchange", restore);
  restore();
})();
