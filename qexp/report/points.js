"use strict";
// One tab stop for many alike (pins of the table, points of a figure); arrows, Home and End move within.
function rove(root, selector) {
  const stops = () => [...root.querySelectorAll(selector)].filter((each) => !each.closest("[hidden], .faded"));
  root.addEventListener("keydown", (event) => {
    const here = event.target.closest(selector), all = stops(), at = all.indexOf(here), end = all.length - 1;
    const to = { ArrowDown: at + 1, ArrowRight: at + 1, ArrowUp: at - 1, ArrowLeft: at - 1, Home: 0, End: end };
    const next = here && all[to[event.key]];
    if (!next) return;
    event.preventDefault();
    here.setAttribute("tabindex", -1);
    next.setAttribute("tabindex", 0);
    next.focus();
  });
  return () => {  // to call where other elements are shown: the first one takes the stop
    for (const old of root.querySelectorAll(`${selector}[tabindex="0"]`)) old.setAttribute("tabindex", -1);
    stops()[0]?.setAttribute("tabindex", 0);
  };
}

// What a point says under the pointer and in focus, until Escape; `more` adds to its name.
function hints(tip, more) {
  function hint(event) {
    const point = event.type === "keydown" ? null : event.target.closest?.(".point");
    if (event.type === "keydown" && event.key !== "Escape") return;
    tip.hidden = !point;
    if (!point) return;
    tip.textContent = point.getAttribute("aria-label") + more(Number(point.dataset.row));
    const at = point.getBoundingClientRect(), { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(at.x + at.width / 2 - width / 2, innerWidth - width - 8))}px`;
    tip.style.top = `${at.y > height + 12 ? at.y - height - 8 : at.bottom + 8}px`;
  }
  for (const type of ["pointerover", "focusin", "keydown"]) document.addEventListener(type, hint);
}
