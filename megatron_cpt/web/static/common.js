// What all pages share: asking the server, making elements, numbers as people read them.

export async function ask(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: {"Content-Type": "application/json"}, body: JSON.stringify(body),
  };
  let answer;
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("the server does not answer: is `megatron-cpt web` still running?");
  }
  const text = await answer.text();
  let value;
  try {
    value = JSON.parse(text);
  } catch {
    throw new Error(text.trim() || `the server answered ${answer.status}`);
  }
  if (!answer.ok) throw new Error(value.hint ? `${value.error} (${value.hint})` : value.error);
  return value;
}

// Children that are strings become text, never markup.
export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name === "class") made.className = value;
    else if (name in made && name !== "list") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

export const find = (selector, within = document) => within.querySelector(selector);
export const findAll = (selector, within = document) => [...within.querySelectorAll(selector)];

export function say(text, good = false) {
  const place = find("#message");
  place.textContent = text;
  place.classList.toggle("good", good);
  place.hidden = !text;
}

// Calls `look` now and every `milliseconds`, but not while the page is hidden or the last look is still going on.
export function keepLooking(look, milliseconds = 2000) {
  let busy = false, failed = false;
  const tick = async () => {
    if (busy || (document.hidden && document.body.dataset.ready)) return;
    busy = true;
    try {
      await look();
      if (failed) say("");
      failed = false;
      find("#live").textContent = `updated ${new Date().toLocaleTimeString()}`;
      document.body.dataset.ready = "1";
    } catch (error) {
      failed = true;
      say(error.message);
    } finally {
      busy = false;
    }
  };
  tick();
  setInterval(tick, milliseconds);
  document.addEventListener("visibilitychange", tick);
  return tick;
}

export function count(number) {
  if (number === null || number === undefined || Number.isNaN(number)) return "–";
  for (const [size, unit] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "K"]]) {
    if (Math.abs(number) >= size) return `${+(number / size).toPrecision(3)}${unit}`;
  }
  return `${+number.toPrecision(4)}`;
}

export const loss = (number) => number === null || number === undefined ? "–" : number.toFixed(4);

export function bytes(number) {
  for (const [size, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (number >= size) return `${(number / size).toFixed(1)} ${unit}`;
  }
  return `${number} B`;
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  const s = Math.round(seconds);
  if (s < 90) return `${s} s`;
  if (s < 5400) return `${Math.round(s / 60)} min`;
  if (s < 172800) return `${(s / 3600).toFixed(1)} h`;
  return `${(s / 86400).toFixed(1)} days`;
}

export const ago = (seconds) => seconds === null || seconds === undefined ? "–" : `${duration(Math.max(0, Date.now() / 1000 - seconds))} ago`;

export function stateOf(run) {
  const text = run.activity && run.activity !== "training" ? `${run.state}: ${run.activity}` : run.state;
  return element("span", {class: `state ${run.state}`}, text);
}

// Rows whose content is the same stay, so that the focus and what is selected stay too.
export function fillTable(body, rows) {
  const old = new Map([...body.children].map((row) => [row.dataset.key, row]));
  body.replaceChildren(...rows.map(({key, content, cells}) => {
    const kept = old.get(key);
    if (kept && kept.dataset.content === content) return kept;
    const row = element("tr", {}, ...cells());
    row.dataset.key = key;
    row.dataset.content = content;
    return row;
  }));
}

export function logView(place, ask) {
  let offset = 0;
  return {
    restart() { offset = 0; place.textContent = ""; },
    async look() {
      const answer = await ask(offset);
      if (answer.offset < offset) place.textContent = "";
      offset = answer.offset;
      if (!answer.text) return answer;
      const atEnd = place.scrollTop + place.clientHeight >= place.scrollHeight - 8;
      place.append(answer.text.replace(/\x1b\[[0-9;?]*[A-Za-z]/g, "").replace(/[^\n]*\r(?!\n)/g, ""));
      if (atEnd) place.scrollTop = place.scrollHeight;
      return answer;
    },
  };
}
