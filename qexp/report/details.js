"use strict";
const shown = (value) => value === undefined ? "–" : typeof value === "string" ? value : JSON.stringify(value);

function make(tag, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(tag), attributes);
  made.append(...children);
  return made;
}

// Details of a run, written when they are opened: a thousand of them would be most of the page.
function details(root, data) {
  const folds = [...root.children];
  const title = (text) => make("h3", {}, text);
  const list = (facts) => make("dl", {}, ...Object.entries(facts).flatMap(
    ([key, value]) => [make("dt", {}, key), make("dd", {}, shown(value))]));
  const text = (config) => Object.entries(config).map(([key, value]) => `${key}=${shown(value)}`).join("\n");

  root.addEventListener("toggle", (event) => {
    const fold = event.target, run = data.runs[folds.indexOf(fold)];
    if (!fold.open || fold.childElementCount > 1) return;
    if (run.error) fold.append(make("pre", { className: "error" }, run.error));
    if (run.warnings.length)
      fold.append(title("Warnings"), make("ul", {}, ...run.warnings.map((warning) => make("li", {}, warning))));
    fold.append(title("Cost and environment"), list({ ...run.facts, ...data.shared.facts }));
    if (Object.keys(run.config).length)
      fold.append(title("Config: what differs between runs"), make("pre", {}, text(run.config)));
    fold.append(title("Config: the same in all runs"), make("pre", {}, text(data.shared.config)));
  }, true);
}
