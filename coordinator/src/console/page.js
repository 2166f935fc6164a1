// Follows a cluster and draws it. No framework and no build step: what is here is what runs.
"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";

// Okabe and Ito's colours, which the colour-blind can tell apart. Nothing is told by colour alone: each
// node has its own band, and leading, holding and receiving differ in how a cell is filled.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8c6d1f", "#7a7a7a"];

// ---- words ---------------------------------------------------------------------------------------

function bytes(count) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  while (count >= 1024 && at < units.length - 1) { count /= 1024; at += 1; }
  return `${at ? count.toFixed(1) : count} ${units[at]}`;
}

function time(ms) {
  if (ms === null || ms === undefined) return "–";
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (ms < 120000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 7200000) return `${Math.round(ms / 60000)} min`;
  return `${Math.round(ms / 3600000)} h`;
}

const latency = (us) => (us < 10000 ? `${(us / 1000).toFixed(2)} ms` : time(us / 1000));
const count = (number) => number.toLocaleString("en");
const short = (text) => (text.length > 7 ? `${text.slice(0, 6)}…` : text);
const plural = (number, name) => `${count(number)} ${name}${number === 1 ? "" : "s"}`;
const list = (ids) => ids.map((id) => `n${id}`).join(" ");

// ---- elements ------------------------------------------------------------------------------------

function element(parent, name, attributes, text) {
  const made = parent.namespaceURI === SVG ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return parent.appendChild(made);
}

// Columns: [heading, is it a number]; a cell: text, or a function that fills it.
function table(id, columns, rows, nothing) {
  const made = $(id);
  made.replaceChildren();
  if (rows.length === 0 && nothing) {
    element(element(made, "tr"), "td", { class: "quiet" }, nothing);
    return;
  }
  const head = element(element(made, "thead"), "tr");
  for (const [heading, number] of columns) element(head, "th", { scope: "col", class: number ? "number" : "" }, heading);
  const body = element(made, "tbody");
  for (const row of rows) {
    const line = element(body, "tr");
    row.forEach((cell, at) => {
      const made = element(line, "td", { class: columns[at][1] ? "number" : "" });
      if (typeof cell === "function") cell(made); else made.textContent = cell;
    });
  }
}

// ---- the ring ------------------------------------------------------------------------------------

const CENTRE = 320, OUTER = 272, INNER = 104, SEAM = 14;

function point(radius, degrees) {
  const radians = ((degrees - 90) * Math.PI) / 180;
  return `${(CENTRE + radius * Math.cos(radians)).toFixed(2)} ${(CENTRE + radius * Math.sin(radians)).toFixed(2)}`;
}

function arc(inner, outer, from, to) {
  const large = to - from > 180 ? 1 : 0;
  return `M${point(outer, from)}A${outer} ${outer} 0 ${large} 1 ${point(outer, to)}` +
    `L${point(inner, to)}A${inner} ${inner} 0 ${large} 0 ${point(inner, from)}Z`;
}

// Shards lie around the circle, and each node is a band of it; zones lie apart.
function ring(now) {
  const svg = $("ring");
  svg.replaceChildren(element(svg, "title", { id: "ring-says" }, says(now)));
  const nodes = [...now.nodes].sort((a, b) => (a.zone < b.zone ? -1 : a.zone > b.zone ? 1 : a.id - b.id));
  const zones = new Set(nodes.map((node) => node.zone));
  const gap = zones.size > 1 ? 8 : 0;
  const thick = nodes.length ? (OUTER - INNER - gap * (zones.size - 1)) / nodes.length : 0;
  const step = (360 - 2 * SEAM) / Math.max(now.shards.length, 1);
  let outer = OUTER, zone = nodes.length ? nodes[0].zone : "";
  for (const node of nodes) {
    if (node.zone !== zone) { outer -= gap; zone = node.zone; }
    const inner = outer - thick + Math.min(2, thick / 5);
    const band = element(svg, "g", { class: "node", "data-node": node.id });
    band.style.setProperty("--node", COLOURS[(node.id - 1) % COLOURS.length]);
    for (const shard of now.shards) {
      const move = shard.to || shard.replicas;
      const role = shard.leader === node.id ? "lead"
        : shard.replicas.includes(node.id) ? "follow"
        : move.includes(node.id) ? "arriving" : "empty";
      const from = SEAM + shard.shard * step;
      const cell = element(band, "path", {
        d: arc(inner, outer, from, from + step),
        class: `cell ${role}${node.silent ? " silent" : ""}`,
        "data-shard": shard.shard,
      });
      element(cell, "title", {}, `shard ${shard.shard} on node ${node.id}: ${role}`);
    }
    element(svg, "text", { x: CENTRE, y: CENTRE - (inner + outer) / 2 + 4, "text-anchor": "middle", class: node.silent ? "bad" : "" },
      `${node.silent ? "✕ " : ""}n${node.id}${node.zone ? ` ${short(node.zone)}` : ""}`);
    outer -= thick;
  }
  const every = Math.ceil(now.shards.length / 32);
  for (const shard of now.shards) {
    const led = shard.leader !== null;
    if (led && shard.shard % every) continue;
    const [x, y] = point(OUTER + 18, SEAM + (shard.shard + 0.5) * step).split(" ");
    element(svg, "text", { x, y: Number(y) + 4, "text-anchor": "middle", class: led ? "quiet" : "bad" },
      led ? shard.shard : `✕ ${shard.shard}`);
  }
  const middle = [`${now.shards.length} shards`, `${now.replicas} replica${now.replicas > 1 ? "s" : ""}`, `map ${now.map_epoch}`];
  middle.forEach((text, at) =>
    element(svg, "text", { x: CENTRE, y: CENTRE - 14 + at * 20, "text-anchor": "middle", class: at ? "quiet" : "" }, text));
}

function says(now) {
  const led = (node) => now.shards.filter((shard) => shard.leader === node.id).length;
  const nodes = now.nodes.map((node) => `node ${node.id} leads ${led(node)}`).join(", ");
  return `${now.shards.length} shards on ${now.nodes.length} nodes: ${nodes}`;
}

// ---- charts --------------------------------------------------------------------------------------

const CHART = { left: 64, right: 590, top: 24, bottom: 160, seconds: 300 };

// Lines: [class, name, values by second]; where one has no value it is interrupted. `least`: the least
// value that the scale goes up to.
function chart(id, end, lines, least, label) {
  const svg = $(id);
  svg.replaceChildren();
  const most = Math.max(least, ...lines.flatMap(([, , values]) => [...values.values()]));
  const y = (value) => CHART.bottom - ((CHART.bottom - CHART.top) * value) / most;
  const x = (second) => CHART.right - ((CHART.right - CHART.left) * (end - second)) / (CHART.seconds - 1);
  for (const part of [0, 0.5, 1]) {
    element(svg, "line", { x1: CHART.left, x2: CHART.right, y1: y(most * part), y2: y(most * part) });
    element(svg, "text", { x: CHART.left - 6, y: y(most * part) + 4, "text-anchor": "end" }, label(most * part));
  }
  element(svg, "text", { x: CHART.left, y: 177 }, "5 min ago");
  element(svg, "text", { x: CHART.right, y: 177, "text-anchor": "end" }, "now");
  lines.forEach(([kind, name, values], at) => {
    let points = [];
    const draw = () => {
      if (points.length) element(svg, "polyline", { class: kind, points: [points[0], ...points].join(" ") });
      points = [];
    };
    for (let second = end - CHART.seconds + 1; second <= end; second += 1) {
      if (values.has(second)) points.push(`${x(second).toFixed(1)},${y(values.get(second)).toFixed(1)}`); else draw();
    }
    draw();
    const left = CHART.left + at * 175;
    element(svg, "polyline", { class: kind, points: `${left},10 ${left + 26},10` });
    element(svg, "text", { x: left + 32, y: 14 }, name);
  });
}

// A second in which nothing happened is in no history: its rate is 0, and it has no latency.
function charts(now) {
  const second = (at_ms) => Math.floor(at_ms / 1000);
  const known = new Map(now.history.map((entry) => [second(entry.at_ms), entry]));
  const end = second(now.at_ms) - 1;
  const first = Math.max(end - CHART.seconds + 1, now.history.length ? second(now.history[0].at_ms) : end);
  const seconds = Array.from({ length: Math.max(end - first + 1, 0) }, (_, at) => first + at);
  const rate = (key) => new Map(seconds.map((at) => [at, known.has(at) ? known.get(at)[key] : 0]));
  const took = (key) => new Map(seconds.filter((at) => known.has(at) && known.get(at)[key]).map((at) => [at, known.get(at)[key]]));
  chart("tps", end, [["first", "committed", rate("committed")], ["second", "aborted", rate("aborted")], ["third", "refused", rate("shed")]],
    10, (value) => count(Math.round(value)));
  chart("latency", end, [["first", "half below", took("p50_us")], ["second", "99 of 100 below", took("p99_us")]], 1000, latency);
}

// ---- everything ----------------------------------------------------------------------------------

function show(now) {
  $("view").hidden = false;
  $("cluster").textContent = `cluster ${now.cluster}`;
  const last = now.history.filter((second) => second.at_ms < now.at_ms - 1000 && second.at_ms >= now.at_ms - 11000);
  const sum = (key) => last.reduce((total, second) => total + second[key], 0);
  const worst = last.reduce((most, second) => Math.max(most, second.p99_us), 0);
  const tiles = [
    [count(Math.round(sum("committed") / 10)), "commits a second"],
    [count(Math.round(sum("aborted") / 10)), "aborts a second"],
    [worst ? latency(worst) : "–", "p99, worst of 10 s"],
    [count(now.in_flight), "being decided"],
    [count(now.in_doubt.length), "in doubt for long"],
    [count(now.moves.length + now.moves_waiting), "shards to move"],
  ];
  $("tiles").replaceChildren();
  for (const [value, name] of tiles) {
    const tile = element($("tiles"), "li");
    element(tile, "strong", {}, value);
    element(tile, "span", { class: "quiet" }, name);
  }
  ring(now);
  charts(now);
  const warn = (bad, text) => (cell) => { cell.textContent = text; if (bad) cell.className = "bad"; };
  table("nodes", [["node"], ["address"], ["zone"], ["weight", true], ["state"], ["holds", true], ["leads", true], ["prepared", true], ["waiting", true], ["last seen", true]],
    now.nodes.map((node) => [`n${node.id}`, node.address, node.zone || "–", node.weight, warn(node.state === "lost", node.state),
      node.holds, node.leads, node.prepared, node.waiting, warn(node.silent, node.seen_ms === null ? "never" : time(node.seen_ms))]));
  table("coordinators", [["coordinator"], ["address"], ["role"]],
    now.coordinators.map((node) => [node.id, node.address, node.id === now.leader ? `leader, epoch ${now.epoch}` : "standby"]));
  table("moves", [["shard", true], ["from"], ["to"], ["stage"], ["done"], ["sent", true], ["left", true], ["for", true]],
    now.moves.map((move) => [move.shard, list(move.from), list(move.to), move.stage,
      (cell) => {
        if (move.permille === null) return;
        element(cell, "progress", { max: 1000, value: move.permille });
        element(cell, "span", {}, ` ${(move.permille / 10).toFixed(1)} %`);
      },
      move.sent === null ? "–" : bytes(move.sent), time(move.left_ms), time(move.age_ms)]),
    "No shard is on its way.");
  $("moved").textContent = `${count(now.moves_waiting)} wait to move; ${count(now.moved_shards)} have moved since the cluster was made, ${bytes(now.moved_bytes)} were sent for that.`;
  doubts(now.in_doubt);
  table("elections", [["when"], ["of"], ["leads since"]],
    [...now.elections].reverse().map((election) => [`${time(Math.max(0, now.at_ms - election.at_ms))} ago`,
      election.shard === null ? "the coordinators" : `shard ${election.shard}`,
      election.shard === null ? `coordinator ${election.node}` : `n${election.node}`]),
    "None since this leader leads.");
  document.body.dataset.drawn = now.at_ms;
}

// Who blocks whom: a transaction that is prepared and not decided, and the reads that wait for it.
function doubts(records) {
  const made = $("doubt");
  made.replaceChildren();
  if (records.length === 0) element(made, "li", { class: "quiet" }, "No transaction has been in doubt for long.");
  for (const record of records) {
    const item = element(made, "li");
    element(item, "code", {}, record.txn);
    element(item, "span", { class: record.age_ms > 10000 ? "bad" : "quiet" }, ` in doubt for ${time(record.age_ms)}`);
    element(item, "div", {}, `shard ${record.shard} waits for the decision; ${plural(record.locks, "lock")}; votes of ${record.participants.join(", ")}; promised to epoch ${record.epoch}`);
    element(item, "div", {}, record.waiting ? `blocks ${plural(record.waiting, "read")}:` : "blocks nobody");
    for (const read of record.blocked) element(item, "div", { class: "quiet" }, `the transaction or snapshot of ${read.at} reads ${read.key}`);
  }
}

// ---- the connection ------------------------------------------------------------------------------

function say(text, bad) {
  $("link").textContent = text;
  $("link").className = bad ? "bad" : "";
}

function ask(reason) {
  $("ask").hidden = false;
  $("view").hidden = true;
  $("refused").textContent = reason;
  say("", false);
}

class Refused extends Error {}

// Server-sent events, read with fetch: an EventSource cannot say who it is.
async function follow(token) {
  // A server that is cut off sends nothing, not even an end.
  const silence = new AbortController();
  let watch = 0;
  const heard = () => {
    clearTimeout(watch);
    watch = setTimeout(() => silence.abort(new Error("nothing has come for 10 s")), 10000);
  };
  heard();
  try {
    await read(token, silence.signal, heard);
  } finally {
    clearTimeout(watch);
  }
}

async function read(token, signal, heard) {
  const answer = await fetch("console/events", { headers: { Authorization: `Bearer ${token}` }, cache: "no-store", signal });
  if (answer.status === 401) throw new Refused("That is not the token.");
  if (!answer.ok) throw new Error((await answer.text()).trim() || `status ${answer.status}`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the server has ended the connection");
    heard();
    rest += value;
    const events = rest.split("\n\n");
    rest = events.pop();
    for (const event of events) {
      const line = (name) => event.split("\n").filter((line) => line.startsWith(name)).map((line) => line.slice(name.length).trim()).join("\n");
      const data = line("data:");
      if (line("event:") === "trouble") { say(data, true); continue; }
      if (!data) continue;
      const now = JSON.parse(data);
      show(now);
      say(now.shown_by === now.leader ? `live from coordinator ${now.leader}, which leads` : `live from coordinator ${now.shown_by}; ${now.leader} leads`, false);
    }
  }
}

// Takes the token out of the address, where it is not to be seen, nor sent on with it.
function take() {
  const told = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!told) return false;
  sessionStorage.setItem("token", told);
  history.replaceState(null, "", location.pathname);
  return true;
}

async function main() {
  take();
  addEventListener("hashchange", () => { if (take()) location.reload(); });
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem("token", $("token").value.trim());
    $("token").value = "";
    $("ask").hidden = true;
    run();
  });
  if (sessionStorage.getItem("token")) run(); else ask("");
}

async function run() {
  let pause = 500;
  for (;;) {
    const began = Date.now();
    try {
      say("connecting", false);
      await follow(sessionStorage.getItem("token"));
    } catch (error) {
      if (error instanceof Refused) {
        sessionStorage.removeItem("token");
        ask(error.message);
        return;
      }
      say(`not connected: ${error.message}; trying again`, true);
    }
    pause = Date.now() - began > 10000 ? 500 : Math.min(pause * 2, 5000);
    await new Promise((resume) => setTimeout(resume, pause));
  }
}

main();
