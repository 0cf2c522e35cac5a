import {ago, ask, bytes, count, duration, element, fillTable, find, findAll, keepLooking, logView, loss, say, stateOf} from "./common.js";
import {Charts, Store, legend} from "./charts.js";

const {run, name} = find("main").dataset;
const query = new URLSearchParams(location.search);
const others = new Map(query.getAll("with").filter((id) => id !== run).map((id) => [id, id]));
const store = new Store();
const charts = new Charts(find("#charts"), store);
let dirty = true, status = null;

const options = () => ({
  x: find("input[name=x]:checked").value, log: find("#log").checked, smooth: +find("#smooth").value,
});
const shownRuns = () => [{id: run, name}, ...[...others].map(([id, other]) => ({id, name: other}))];

function redraw() {
  charts.draw(shownRuns(), options());
  legend(find("#legend"), shownRuns());
}

findAll(".toolbar input").forEach((input) => input.addEventListener("input", redraw));
find("#with").addEventListener("change", (event) => {
  const id = event.target.value;
  if (!id) return;
  if (others.has(id)) { others.delete(id); store.drop(id); } else others.set(id, event.target.selectedOptions[0].dataset.name);
  event.target.value = "";
  history.replaceState(null, "", `/runs/${run}` + [...others.keys()].map((o, i) => `${i ? "&" : "?"}with=${o}`).join(""));
  dirty = true;
  look();
});

const card = (title, ...content) => element("div", {class: "card"}, element("span", {}, title), element("b", {}, ...content));

function showCards(s) {
  const share = s.train_tokens ? s.consumed_tokens / s.train_tokens : 0;
  const cards = [card("state", stateOf(s))];
  if (s.state !== "unreadable") {
    cards.push(card("tokens", `${count(s.consumed_tokens)} of ${count(s.train_tokens)} `,
      element("progress", {max: 1, value: Math.min(1, share), "aria-label": "progress"})));
    cards.push(card("iteration", s.iteration.toLocaleString()), card("loss", loss(s.loss)));
    if (s.state === "running") cards.push(card("tokens/s", count(s.tokens_per_second)), card("left", duration(s.eta_seconds)));
    cards.push(card("last update", ago(s.updated)));
  }
  if (s.switches.length) cards.push(card("switches set", s.switches.join(", ")));
  if (s.writer) cards.push(card("written by", s.writer));
  for (const problem of [s.last_error, s.problem].filter(Boolean)) {
    const wide = card("problem", problem);
    wide.classList.add("wide", "problem");
    cards.push(wide);
  }
  find("#cards").replaceChildren(...cards);
}

function showActions(s) {
  const running = s.state === "running";
  const enabled = {stop: running, save: running, kill: running, continue: !running && s.state !== "unreadable"};
  for (const [action, on] of Object.entries(enabled)) find(`[data-action=${action}]`).disabled = !on;
}

function showCheckpoints(s) {
  fillTable(find("#checkpoints tbody"), [...s.checkpoints].reverse().map((c) => ({
    key: c.path, content: JSON.stringify(c), cells: () => [
      element("td", {class: "path"}, c.path.split("/").at(-1), c.best ? " (best)" : ""),
      element("td", {class: "number"}, count(c.consumed_tokens)), element("td", {class: "number"}, c.bytes === null ? "–" : bytes(c.bytes)),
      element("td", {}, c.created ? new Date(c.created).toLocaleString() : "–"),
      element("td", {}, Object.entries(c.validation).map(([set, value]) => `${set} ${loss(value)}`).join(", ")),
      element("td", {class: "problem"}, c.complete ? c.faults.join("; ") : c.faults.join("; ") || "not complete"),
    ],
  })));
  const select = find("#convert [name=checkpoint]");
  const names = s.checkpoints.filter((c) => c.complete).map((c) => c.path.split("/").at(-1)).reverse();
  if (select.dataset.names !== names.join()) {
    const before = select.value;
    select.replaceChildren(element("option", {value: ""}, "the newest"), ...names.map((n) => element("option", {}, n)));
    select.value = names.includes(before) ? before : "";
    select.dataset.names = names.join();
  }
}

function showSlurm(view) {
  find("#slurm").hidden = !view;
  if (!view) return;
  const rows = [
    ...view.jobs.map((j) => [`job ${j.job}`, j.state === "PENDING" ? `waits: ${j.reason}` : `${j.state.toLowerCase()} on ${j.nodes}, ${j.time_left} left`]),
    ...view.restarts.map((r) => [`start ${r.job}.${r.restart}`, r.cause || "no end is noted"]),
    ...Object.entries(view.excluded_nodes).map(([node, why]) => [`excluded ${node}`, why]),
  ];
  if (view.problem) rows.push(["Slurm", view.problem]);
  fillTable(find("#slurm tbody"), rows.map(([what, text]) => ({
    key: what, content: text, cells: () => [element("th", {scope: "row"}, what), element("td", {}, text)],
  })));
}

function showEvents() {
  const events = [...(store.events.get(run) || [])].reverse();
  find("#events summary").textContent = `Events (${events.length})`;
  if (!find("#events").open) return;
  fillTable(find("#events tbody"), events.map((e, i) => ({
    key: `${events.length - i}`, content: JSON.stringify(e), cells: () => [
      element("td", {}, new Date(e.time * 1000).toLocaleString()), element("td", {class: "number"}, count(e.tokens)),
      element("td", {}, e.event), element("td", {}, e.reason || e.name || e.phase || ""),
    ],
  })));
}

async function lookAtRuns() {
  const runs = await ask("/api/runs");
  for (const place of ["#with", "#against"]) {
    const select = find(place), rest = runs.filter((r) => r.id !== run);
    const content = rest.map((r) => r.id).join();
    if (select.dataset.content === content) continue;
    const before = select.value;
    select.replaceChildren(element("option", {value: ""}, "–"), ...rest.map((r) => {
      const option = element("option", {value: r.id}, r.name);
      option.dataset.name = r.name;
      return option;
    }));
    select.value = before;
    select.dataset.content = content;
  }
  for (const r of runs) if (others.has(r.id)) others.set(r.id, r.name);
}

const rankLog = logView(find("#log-text"), (offset) =>
  ask(`/api/runs/${run}/log?name=${encodeURIComponent(find("#log-name").value)}&offset=${offset}`));

async function lookAtLogs() {
  if (!find("#logs").open) return;
  const select = find("#log-name");
  if (select.dataset.names !== status.logs.join()) {
    const before = select.value;
    select.replaceChildren(...status.logs.map((n) => element("option", {}, n)));
    if (status.logs.includes(before)) select.value = before;
    select.dataset.names = status.logs.join();
  }
  if (select.value) await rankLog.look();
}
find("#log-name").addEventListener("change", () => { rankLog.restart(); look(); });
find("#logs").addEventListener("toggle", () => look());

async function lookAtConfig() {
  if (!find("#config").open) return;
  const against = find("#against").value;
  const answer = await ask(`/api/runs/${run}/config?against=${encodeURIComponent(against)}`);
  find("#config-text").textContent = answer.yaml;
  find("#differs").hidden = !against;
  const shown = (value) => value === null ? "not set" : typeof value === "string" ? value : JSON.stringify(value);
  fillTable(find("#differs tbody"), answer.differs.map((d) => ({
    key: d.path, content: JSON.stringify(d), cells: () => [
      element("td", {class: "path"}, d.path), element("td", {class: "path"}, shown(d.theirs)), element("td", {class: "path"}, shown(d.ours)),
    ],
  })));
}
find("#config").addEventListener("toggle", () => lookAtConfig().catch((error) => say(error.message)));
find("#against").addEventListener("change", () => lookAtConfig().catch((error) => say(error.message)));

const look = keepLooking(async () => {
  const [answer] = await Promise.all([
    ask(`/api/runs/${run}`),
    ...shownRuns().map(async ({id}) => {
      dirty = store.take(id, await ask(`/api/runs/${id}/curves`, store.known(id))) || dirty;
    }),
    lookAtRuns(),
  ]);
  status = answer;
  showCards(status);
  showActions(status);
  showCheckpoints(status);
  showSlurm(status.slurm);
  showEvents();
  if (dirty) redraw();
  dirty = false;
  await lookAtLogs();
});
find("#events").addEventListener("toggle", showEvents);

async function act(action, body = {}) {
  try {
    const answer = await ask(`/api/runs/${run}/${action}`, body);
    if (answer.job && action === "verify") location.assign(`/jobs/${answer.job.id}`);
    else say(answer.effect || "started", true);
    look();
  } catch (error) {
    say(error.message);
  }
}
findAll("[data-action]").forEach((button) => button.addEventListener("click", () => {
  if (button.dataset.action !== "kill") { act(button.dataset.action); return; }
  const dialog = find("#sure");
  dialog.returnValue = "no";
  dialog.showModal();
  dialog.addEventListener("close", () => { if (dialog.returnValue === "yes") act("kill", {sure: true}); }, {once: true});
}));
find("#verify").addEventListener("click", () => act("verify"));

for (const kind of ["convert", "eval"]) {
  find(`#${kind}`).addEventListener("submit", async (event) => {
    event.preventDefault();
    const values = {run, ...Object.fromEntries(new FormData(event.target))};
    try {
      const answer = await ask("/api/start", {kind, values});
      if (answer.job) location.assign(`/jobs/${answer.job.id}`);
      else say(answer.problems.map((p) => `${p.path}: ${p.message} (${p.hint})`).join("; "));
    } catch (error) {
      say(error.message);
    }
  });
}
