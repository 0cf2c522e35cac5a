// Charts of one or more runs over tokens or time, with one cursor for all. uPlot draws them.
import {count, element} from "./common.js";

export const COLOURS = ["#2f7bd1", "#d1600a", "#1a9a4b", "#9a4fc4", "#c2373a", "#7a7a2a", "#1299a8", "#b0448f"];
const EVENTS = {saved: "#8a93a0", restarted: "#d1600a", skipped: "#c2373a", rolled_back: "#c2373a", phase: "#9a4fc4"};
const DASHES = [[], [6, 4], [2, 3], [10, 3, 2, 3], [1, 4]];

const PLAIN = [
  ["loss", "training loss", "loss"], ["lr", "learning rate", "lr"], ["grad_norm", "gradient norm", "grad_norm"],
  ["tokens_per_second", "tokens per second", "tokens_per_second"], ["peak_memory_gib", "peak memory of rank 0, GiB", "peak_memory_gib"],
  ["global_batch_size", "samples per step", "global_batch_size"],
];
const GROUPS = [
  ["validation/", "validation loss"], ["loss_by_source/", "loss by source"], ["share_by_source/", "share of tokens by source"],
  ["loss_terms/", "terms of the loss"],
];

const SCHEDULE = " (schedule)"; // a dashed line in the colour of what came of it

// Points that the page has of each run: run -> curve -> {generation, tokens, times, values}.
export class Store {
  constructor() { this.runs = new Map(); this.events = new Map(); }

  known(run) {
    const curves = this.runs.get(run) || {};
    return Object.fromEntries(Object.entries(curves).map(([name, c]) => [name, [c.generation, c.tokens.length]]));
  }

  take(run, answer) {
    const curves = this.runs.get(run) || {};
    for (const name of Object.keys(curves)) if (!(name in answer.curves)) delete curves[name];
    let changed = false;
    for (const [name, news] of Object.entries(answer.curves)) {
      const old = curves[name];
      const keep = old && old.generation === news.generation ? news.first : 0;
      const join = (key) => [...(old ? old[key].slice(0, keep) : []), ...news[key]];
      const next = {generation: news.generation, tokens: join("tokens"), times: join("times"), values: join("values")};
      changed ||= !old || next.tokens.length !== old.tokens.length || next.generation !== old.generation
        || next.tokens.at(-1) !== old.tokens.at(-1);
      curves[name] = next;
    }
    this.runs.set(run, curves);
    this.events.set(run, answer.events);
    return changed;
  }

  drop(run) { this.runs.delete(run); this.events.delete(run); }
}

function smoothed(values, weight) {
  let mean = null;
  return values.map((value) => {
    if (value === null) return null;
    mean = mean === null ? value : weight * mean + (1 - weight) * value;
    return mean;
  });
}

// Which lines a chart has: {label, colour, dash, x, y, thin}.
function linesOf(store, runs, pick, options) {
  const lines = [];
  runs.forEach((run, index) => {
    const curves = store.runs.get(run.id) || {};
    const names = Object.keys(curves).filter(pick).sort();
    const drawn = names.filter((name) => !name.endsWith(SCHEDULE));
    names.forEach((name) => {
      const scheduled = name.endsWith(SCHEDULE);
      const place = Math.max(0, drawn.indexOf(scheduled ? name.slice(0, -SCHEDULE.length) : name));
      const curve = curves[name];
      const start = curve.times[0] ?? 0;
      const x = options.x === "times" ? curve.times.map((t) => (t - start) / 3600) : curve.tokens;
      const part = name.includes("/") ? name.slice(name.indexOf("/") + 1) : "";
      const label = [runs.length > 1 ? run.name : "", part].filter(Boolean).join(" ") || run.name;
      const colour = runs.length > 1 || !part ? COLOURS[index % COLOURS.length] : COLOURS[place % COLOURS.length];
      const dash = scheduled ? DASHES[1] : runs.length > 1 && part ? DASHES[place % DASHES.length] : [];
      const sparse = name.startsWith("validation/");
      if (name === "loss" && options.smooth > 0 && curve.values.length > 3) {
        lines.push({label: "", colour: colour + "55", dash, x, y: curve.values, sparse});
        lines.push({label, colour, dash, x, y: smoothed(curve.values, options.smooth), sparse});
      } else {
        lines.push({label, colour, dash, x, y: curve.values, sparse});
      }
    });
  });
  return lines;
}

function eventLines(store, runs, options) {
  const run = runs[0];
  const curve = (store.runs.get(run.id) || {}).loss;
  if (!curve) return [];
  const start = curve.times[0] ?? 0;
  return (store.events.get(run.id) || []).filter((e) => e.event in EVENTS)
    .map((e) => ({x: options.x === "times" ? (e.time - start) / 3600 : e.tokens, colour: EVENTS[e.event]}));
}

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-2)) return value.toExponential(2);
  return size >= 1000 ? count(value) : `${+value.toPrecision(4)}`;
}

class Chart {
  constructor(place, key, title) {
    this.key = key;
    this.title = title;
    this.said = element("output");
    const save = element("button", {type: "button", class: "small", title: "download this chart as PNG"}, "PNG");
    save.addEventListener("click", () => this.download());
    this.place = element("div", {class: "chart"}, element("h3", {}, title, this.said, save));
    this.place.dataset.chart = key;
    place.append(this.place);
  }

  draw(lines, events, options) {
    this.events = events;
    const shape = JSON.stringify([lines.map((line) => [line.label, line.colour, line.dash]), options.x, options.log]);
    const data = lines.length > 1 ? uPlot.join(lines.map((line) => [line.x, line.y])) : [lines[0].x, lines[0].y];
    if (this.plot && this.shape === shape) {
      this.plot.setData(data);
      return;
    }
    this.shape = shape;
    if (this.plot) this.plot.destroy();
    const text = css("--soft"), grid = {stroke: css("--line"), width: 1};
    const log = options.log && /loss/.test(this.key);
    this.plot = new uPlot({
      width: Math.max(200, this.place.clientWidth - 16), height: 220, legend: {show: false},
      cursor: {sync: {key: "x"}, focus: {prox: 24}},
      scales: {x: {time: false}, y: log ? {distr: 3} : {}},
      axes: [
        {stroke: text, grid, ticks: grid, values: (u, ticks) => ticks.map((t) => options.x === "times" ? `${+t.toPrecision(3)} h` : count(t))},
        {stroke: text, grid, ticks: grid, size: 64, values: (u, ticks) => ticks.map((t) => t === null ? "" : number(t))},
      ],
      series: [{}, ...lines.map((line) => ({
        label: line.label, stroke: line.colour, width: 1.5, dash: line.dash, spanGaps: true,
        points: {show: line.sparse, size: 6, fill: line.colour},
      }))],
      hooks: {
        drawClear: [(u) => this.drawEvents(u)],
        setCursor: [(u) => this.tell(u, lines, options)],
      },
    }, data, this.place);
  }

  drawEvents(u) {
    for (const event of this.events) {
      const x = u.valToPos(event.x, "x", true);
      if (!(x >= u.bbox.left && x <= u.bbox.left + u.bbox.width)) continue;
      u.ctx.save();
      u.ctx.strokeStyle = event.colour;
      u.ctx.globalAlpha = 0.5;
      u.ctx.setLineDash([3, 3]);
      u.ctx.beginPath();
      u.ctx.moveTo(x, u.bbox.top);
      u.ctx.lineTo(x, u.bbox.top + u.bbox.height);
      u.ctx.stroke();
      u.ctx.restore();
    }
  }

  tell(u, lines, options) {
    const index = u.cursor.idx;
    if (index === null || index === undefined) { this.said.textContent = ""; return; }
    const x = u.data[0][index];
    const where = options.x === "times" ? `${+x.toPrecision(3)} h` : count(x);
    const values = lines.map((line, i) => [line.label, u.data[i + 1][index]]).filter(([label, v]) => label && v !== null && v !== undefined);
    this.said.textContent = `${where}: ` + values.map(([label, v]) => lines.length > 2 ? `${label} ${number(v)}` : number(v)).join(", ");
  }

  resize() {
    if (this.plot) this.plot.setSize({width: Math.max(200, this.place.clientWidth - 16), height: 220});
  }

  download() {
    const source = this.plot.ctx.canvas;
    const copy = element("canvas", {width: source.width, height: source.height + 40});
    const ctx = copy.getContext("2d");
    ctx.fillStyle = css("--page");
    ctx.fillRect(0, 0, copy.width, copy.height);
    ctx.fillStyle = css("--text");
    ctx.font = "24px system-ui, sans-serif";
    ctx.fillText(this.title, 12, 28);
    ctx.drawImage(source, 0, 40);
    copy.toBlob((blob) => {
      const link = element("a", {href: URL.createObjectURL(blob), download: `${this.key.replace(/\W+/g, "_")}.png`});
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }
}

export class Charts {
  constructor(place, store) {
    this.place = place;
    this.store = store;
    this.charts = new Map();
    let waiting = 0;
    new ResizeObserver(() => {
      cancelAnimationFrame(waiting);
      waiting = requestAnimationFrame(() => this.charts.forEach((chart) => chart.resize()));
    }).observe(place);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
      this.charts.forEach((chart) => { chart.shape = null; });
      if (this.last) this.draw(...this.last);
    });
  }

  draw(runs, options) {
    this.last = [runs, options];
    const wanted = [
      ...PLAIN.map(([key, title, name]) => [key, title, (curve) => curve === name]),
      ...GROUPS.map(([prefix, title]) => [prefix, title, (curve) => curve.startsWith(prefix)]),
    ];
    const events = eventLines(this.store, runs, options);
    for (const [key, title, pick] of wanted) {
      const lines = linesOf(this.store, runs, pick, options);
      if (!lines.some((line) => line.x.length)) continue;
      if (!this.charts.has(key)) this.charts.set(key, new Chart(this.place, key, title));
      this.charts.get(key).draw(lines, events, options);
    }
  }
}

export function legend(place, runs) {
  place.replaceChildren(...(runs.length < 2 ? [] : runs.map((run, index) => {
    const ns = "http://www.w3.org/2000/svg";
    const svg = document.createElementNS(ns, "svg");
    svg.setAttribute("viewBox", "0 0 14 7");
    const rect = document.createElementNS(ns, "rect");
    rect.setAttribute("width", "14");
    rect.setAttribute("height", "7");
    rect.setAttribute("fill", COLOURS[index % COLOURS.length]);
    svg.append(rect);
    return element("li", {}, svg, run.name);
  })));
}
