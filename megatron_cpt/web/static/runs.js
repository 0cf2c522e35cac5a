import {ago, ask, count, duration, element, fillTable, find, findAll, keepLooking, loss, stateOf} from "./common.js";

const chosen = new Set();
const button = find("#compare button");

function row(run) {
  const share = run.train_tokens ? run.consumed_tokens / run.train_tokens : 0;
  const shown = JSON.stringify([run, run.updated && Math.round((Date.now() / 1000 - run.updated) / 10)]);
  return {key: run.id, content: shown, cells: () => {
    const box = element("input", {type: "checkbox", value: run.id, checked: chosen.has(run.id), "aria-label": `compare ${run.name}`});
    box.addEventListener("change", () => {
      box.checked ? chosen.add(run.id) : chosen.delete(run.id);
      button.disabled = chosen.size < 2;
    });
    const link = element("a", {href: `/runs/${run.id}`}, run.name);
    if (run.problem) {
      return [element("td", {}, box), element("td", {class: "path"}, link), element("td", {}, stateOf(run)),
        element("td", {colSpan: 5}, run.problem)];
    }
    return [
      element("td", {}, box), element("td", {class: "path"}, link), element("td", {}, stateOf(run)),
      element("td", {}, element("progress", {max: 1, value: Math.min(1, share), "aria-label": "progress"}),
        ` ${count(run.consumed_tokens)} of ${count(run.train_tokens)}`),
      element("td", {class: "number"}, loss(run.loss)), element("td", {class: "number"}, count(run.tokens_per_second)),
      element("td", {class: "number"}, run.state === "running" ? duration(run.eta_seconds) : "–"),
      element("td", {}, ago(run.updated)),
    ];
  }};
}

keepLooking(async () => {
  const runs = await ask("/api/runs");
  find("#empty").hidden = runs.length > 0;
  find("#compare").hidden = runs.length === 0;
  fillTable(find("#runs tbody"), runs.map(row));
});

find("#compare").addEventListener("submit", (event) => {
  event.preventDefault();
  const ids = findAll("#runs input:checked").map((box) => box.value);
  const query = ids.slice(1).map((id) => `with=${encodeURIComponent(id)}`).join("&");
  location.assign(`/runs/${ids[0]}?${query}`);
});
