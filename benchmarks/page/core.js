// Data, and small things that every part uses. Text goes into the page as text only: names are never parsed as HTML.

const data = JSON.parse(document.getElementById("data").textContent);
const rows = data.rows.columns;
const strings = data.rows.strings;
const get = (name, row) => (name in strings ? strings[name][rows[name][row]] ?? "" : rows[name][row]);
const byId = (id) => document.getElementById(id);
// What is chosen for all of the page: methods, by label; none that is not in it is shown anywhere.
const known = Object.keys(data.looks);
const isVariant = (method) => method.includes(",");
const chosen = { methods: new Set(known), board: 0, timed: null, bytes: 0.5, speed: 1.5, nats: 0.25, variants: false, front: true };
const isShown = (method) => method === "dense" || chosen.methods.has(method);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

// The namespace is taken from the page, which holds no address.
function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS(byId("svg").namespaceURI, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const number = (v) => (v === "inf" ? Infinity : v === "-inf" ? -Infinity : v);

// A value for a table: enough digits to compare, few enough to read.
function short(raw) {
  const v = number(raw);
  if (v === null || v === undefined) return "–";
  if (!Number.isFinite(v)) return v > 0 ? "∞" : "−∞";
  const size = Math.abs(v);
  if (size >= 1e4 || (size > 0 && size < 1e-3)) {
    const [mantissa, power] = v.toExponential(1).split("e");
    return `${mantissa.replace("-", "−")}e${power.replace("+", "").replace("-", "−")}`;
  }
  const digits = size < 0.1 && size > 0 ? 4 : size < 10 ? 3 : size < 100 ? 2 : 0;
  return v.toFixed(digits).replace("-", "−");
}

// A value as it was written.
function exact(raw) {
  const v = number(raw);
  return v === null || v === undefined ? "–" : Number.isFinite(v) ? String(v).replace("-", "−") : short(v);
}

const interval = (low, high) => `[${short(low)}, ${short(high)}]`;
const target = (t) => data.targets[String(t)] ?? String(t);

function metricName(metric) {
  const arrow = { "-1": " ↓", 1: " ↑" }[data.directions[metric]] ?? "";
  const unit = unitOf(metric);
  return metric.replaceAll("_", " ").replace("/", ": ") + (unit ? ` (${unit})` : "") + arrow;
}

const policies = { "all-but-first-1": "all but the first" };
const policyName = (tokens) => policies[tokens] ?? tokens.replaceAll("-", " ");
const shortModel = (model) => model.split(" (")[0];

const UNITS = {
  perplexity: "", kl: "nats/token", kl_on_dense: "nats/token", nats_per_byte: "nats/byte", acc: "share right", acc_norm: "share right", speedup: "× dense",
  limit: "× dense", share: "share of the limit", tokens_per_second: "tokens/s", bytes_per_token: "bytes", bandwidth: "bytes/s", seconds: "s",
  over_linear: "× linear", over_plain: "× plain", over_base: "× base", prefill_sparse: "s", prefill_dense: "s",
};
function unitOf(metric) {
  const last = metric.split("/").at(-1);
  if (/_p\d+$/.test(last)) return "s";
  return UNITS[last] ?? UNITS[Object.keys(UNITS).find((name) => last.endsWith(`_${name}`))] ?? "";
}

const SHAPES = {
  o: (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  8: (r) => polygon(ring(8, () => 1), r),
  s: (r) => polygon([[-1, -1], [1, -1], [1, 1], [-1, 1]], r * 0.9),
  v: (r) => polygon([[-1, -0.8], [1, -0.8], [0, 1]], r * 1.1),
  "^": (r) => polygon([[-1, 0.8], [1, 0.8], [0, -1]], r * 1.1),
  "<": (r) => polygon([[0.8, -1], [0.8, 1], [-1, 0]], r * 1.1),
  ">": (r) => polygon([[-0.8, -1], [-0.8, 1], [1, 0]], r * 1.1),
  D: (r) => polygon([[0, -1], [1, 0], [0, 1], [-1, 0]], r * 1.2),
  d: (r) => polygon([[0, -1], [0.62, 0], [0, 1], [-0.62, 0]], r * 1.25),
  P: (r) => polygon(cross(0.4), r * 1.1),
  X: (r) => polygon(cross(0.4).map(([x, y]) => [(x - y) * 0.75, (x + y) * 0.75]), r * 1.1),
  "*": (r) => polygon(ring(10, (i) => (i % 2 ? 0.5 : 1.25)), r),
  h: (r) => polygon(ring(6, () => 1.1), r),
  H: (r) => polygon(ring(6, () => 1.1).map(([x, y]) => [y, x]), r),
  p: (r) => polygon(ring(5, () => 1.15), r),
};
// The part of a marker that is filled, as a share of its box: from the left, from the top, width, height.
const FILLED = { left: [-1, -1, 1, 2], right: [0, -1, 1, 2], top: [-1, -1, 2, 1], bottom: [-1, 0, 2, 1] };
const cross = (a) =>
  [[-a, -1], [a, -1], [a, -a], [1, -a], [1, a], [a, a], [a, 1], [-a, 1], [-a, a], [-1, a], [-1, -a], [-a, -a]];
const ring = (n, radius) =>
  Array.from({ length: n }, (_, i) => {
    const angle = (2 * Math.PI * i) / n - Math.PI / 2;
    return [radius(i) * Math.cos(angle), radius(i) * Math.sin(angle)];
  });
const polygon = (points, r) => `M${points.map(([x, y]) => `${(x * r).toFixed(2)},${(y * r).toFixed(2)}`).join("L")}z`;

// Colours are lighter in the dark; the dense model is drawn in ink.
const colourOf = (method) => {
  const colour = method === "dense" ? null : data.looks[method]?.[0];
  return colour ? `light-dark(${colour}, color-mix(in oklab, ${colour} 75%, white))` : "var(--ink)";
};

let clips = 0;

function marker(method, radius) {
  const [, shape, fill] = method === "dense" ? [0, "8", "full"] : (data.looks[method] ?? [0, "o", "full"]);
  const colour = colourOf(method);
  const path = drawn("path", { d: (SHAPES[shape] ?? SHAPES.o)(radius), class: "marker" });
  path.style.fill = fill === "full" ? colour : "var(--surface)";
  path.style.stroke = colour;
  const half = FILLED[fill];
  if (!half) return path;
  const id = `clip${(clips += 1)}`;
  const size = 2 * radius;
  const [x, y, width, height] = half.map((v) => v * size);
  const inside = drawn("path", { d: path.getAttribute("d"), "clip-path": `url(#${id})` });
  inside.style.fill = colour;
  const clip = drawn("clipPath", { id }, drawn("rect", { x, y, width, height }));
  return drawn("g", {}, clip, path, inside);
}

function swatch(method, wide = false) {
  const width = wide ? 34 : 14;
  const icon = drawn("svg", { width, height: 14, viewBox: `${-width / 2} -7 ${width} 14`, "aria-hidden": "true" });
  icon.classList.add("swatch");
  if (wide && method !== "dense") {
    const line = drawn("line", { x1: -16, x2: 16, y1: 0, y2: 0, "stroke-dasharray": data.looks[method]?.[3] ?? "" });
    line.style.stroke = colourOf(method);
    icon.append(line);
  }
  icon.append(marker(method, 4));
  return icon;
}
