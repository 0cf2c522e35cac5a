import {ask, count, element, find, findAll, say} from "./common.js";

const kind = find("main").dataset.kind;
const fields = findAll(".field");

function addRow(field, values = {}) {
  const columns = field.dataset.kind === "pairs" ? ["name", "value"] : field.dataset.columns.split(",");
  const remove = element("button", {type: "button", class: "small", "aria-label": "remove this line"}, "×");
  const row = element("div", {class: "row"}, ...columns.map((column) => {
    const input = element("input", {placeholder: column, value: values[column] ?? "", spellcheck: false, "aria-label": `${field.dataset.path} ${column}`});
    input.dataset.column = column;
    return input;
  }), remove);
  remove.addEventListener("click", () => row.remove());
  find(".rows", field).append(row);
}

function entered(field) {
  if (field.dataset.kind === "rows") {
    return findAll(".row", field).map((row) => Object.fromEntries(findAll("input", row).map((i) => [i.dataset.column, i.value])));
  }
  if (field.dataset.kind === "pairs") {
    return Object.fromEntries(findAll(".row", field).map((row) => findAll("input", row).map((i) => i.value)).filter(([n]) => n));
  }
  return find("input, select, textarea", field).value;
}

function fill(values) {
  for (const field of fields) {
    const value = values[field.dataset.path];
    if (field.dataset.kind === "rows" || field.dataset.kind === "pairs") {
      find(".rows", field).replaceChildren();
      const rows = value === undefined ? [{}] : field.dataset.kind === "rows" ? value
        : Object.entries(value).map(([n, v]) => ({name: n, value: v}));
      rows.forEach((row) => addRow(field, row));
    } else {
      find("input, select, textarea", field).value = value ?? "";
    }
    if (value !== undefined && field.closest("details")) field.closest("details").open = true;
  }
}

const values = () => Object.fromEntries(fields.map((field) => [field.dataset.path, entered(field)]));

function showProblems(problems) {
  fields.forEach((field) => {
    field.classList.remove("wrong");
    find(".problem", field).hidden = true;
  });
  const elsewhere = [];
  for (const problem of problems) {
    const field = fields.find((f) => problem.path === f.dataset.path || problem.path.startsWith(`${f.dataset.path}.`));
    const text = problem.hint ? `${problem.message} — ${problem.hint}` : problem.message;
    if (!field) { elsewhere.push(text); continue; }
    const place = find(".problem", field);
    place.textContent = place.hidden ? text : `${place.textContent}; ${text}`;
    place.hidden = false;
    field.classList.add("wrong");
    if (field.closest("details")) field.closest("details").open = true;
  }
  find("#problems").replaceChildren(...elsewhere.map((text) => element("li", {}, text)));
  const first = find(".field.wrong");
  if (first) first.scrollIntoView({block: "center"});
}

function show(answer) {
  find("#outcome").hidden = false;
  showProblems(answer.problems);
  find("#command").textContent = answer.command;
  find("#files").replaceChildren(...Object.entries(answer.files).map(([name, text]) =>
    element("div", {}, element("h3", {}, name), element("pre", {tabIndex: 0, "aria-label": name}, text))));
  find("#page").textContent = answer.page;
  find("#page").hidden = !answer.page;
  find("#layouts").hidden = !answer.layouts.length;
  find("#layouts tbody").replaceChildren(...answer.layouts.map((layout) => {
    const use = element("button", {type: "button", class: "small"}, "Use");
    use.addEventListener("click", () => take(layout.overrides));
    return element("tr", {}, element("td", {class: "number"}, count(layout.tokens_per_s)),
      element("td", {class: "path"}, layout.overrides.join(" ") || "the config as it is"), element("td", {}, use));
  }));
}

function take(overrides) {
  for (const override of overrides) {
    const [path, value] = [override.slice(0, override.indexOf("=")), override.slice(override.indexOf("=") + 1)];
    const field = fields.find((f) => f.dataset.path === path);
    if (!field) continue;
    find("input, select, textarea", field).value = value;
    if (field.closest("details")) field.closest("details").open = true;
  }
  preview();
}

async function send(path, body) {
  say("");
  const buttons = findAll("#form .buttons button");
  buttons.forEach((button) => { button.disabled = true; });
  try {
    const answer = await ask(path, {kind, values: values(), ...body});
    show(answer);
    return answer;
  } catch (error) {
    say(error.message);
    return null;
  } finally {
    buttons.forEach((button) => { button.disabled = false; });
  }
}

async function preview(body = {}) {
  const answer = await send("/api/preview", body);
  if (answer && !answer.problems.length) say("Nothing speaks against it.", true);
}

async function start(body = {}) {
  const answer = await send("/api/start", body);
  if (answer && answer.job) location.assign(`/jobs/${answer.job.id}`);
  else if (answer) say("Nothing was started: see what is marked below.");
}

find("#preview").addEventListener("click", () => preview());
find("#search")?.addEventListener("click", () => preview({layouts: true}));
find("#start").addEventListener("click", () => start());
find("#submit")?.addEventListener("click", () => start({kind: "submit"}));
find("#form").addEventListener("submit", (event) => { event.preventDefault(); preview(); });
findAll(".add").forEach((button) => button.addEventListener("click", () => addRow(button.closest(".field"))));

find("#preset")?.addEventListener("submit", async (event) => {
  event.preventDefault();
  const data = new FormData(event.target);
  if (!data.get("name")) return;
  try {
    fill((await ask("/api/preset", {name: data.get("name"), gpus: +data.get("gpus")})).values);
    say("Filled in. Change what differs: the model's folder, the data, the budget.", true);
  } catch (error) {
    say(error.message);
  }
});

fill({});
const from = new URLSearchParams(location.search).get("from");
if (from && kind === "train") {
  ask(`/api/runs/${encodeURIComponent(from)}/values`).then((answer) => fill(answer.values)).catch((error) => say(error.message));
}
document.body.dataset.ready = "1";
