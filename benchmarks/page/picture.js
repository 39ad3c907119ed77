// Charts: losses against bytes and against speed, and speed against bytes, drawn to the width there is.

const TICKS_Y = [0, 0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3];
// A square root keeps zero in the picture and the small losses apart.
const bend = (nats) => Math.sign(nats) * Math.sqrt(Math.abs(nats));
const straight = (v) => v;

function ticks(low, high, most) {
  const step = [0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5, 10, 20].find((s) => (high - low) / s <= most) ?? 50;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => Number(((first + i) * step).toFixed(4)));
}

// Points that no other one beats in both: `more` says whether more of x is better; less of y is.
function front(points) {
  const sorted = [...points].sort((a, b) => b.x - a.x || a.y - b.y);
  const out = [];
  let least = Infinity;
  for (const point of sorted) {
    if (point.y < least) out.push(point);
    least = Math.min(least, point.y);
  }
  return out.reverse();
}

// `spec`: { series: [{ method, points: [{ x, y, xs, ys, name, lines, cells }] }], x, y: axis names, root, unit, front }
function drawChart(host, spec) {
  const box = byId(host);
  const svg = drawn("svg", { role: "group", "aria-label": spec.title });
  box.replaceChildren(svg);
  const points = spec.series.flatMap((series) => series.points);
  if (!points.length) {
    box.replaceChildren(element("p", { class: "note empty" }, spec.empty ?? "Nothing to draw under these filters."));
    return;
  }
  const width = Math.max(280, box.clientWidth);
  const height = Math.round(Math.min(400, Math.max(300, width * 0.62)));
  // A narrow picture breaks the name of an axis behind its comma.
  const broken = (label) => (width < 520 && label.includes(", ") ? [`${label.split(", ")[0]},`, label.split(", ").slice(1).join(", ")] : [label]);
  const [yName, xName] = [broken(spec.y), broken(spec.x)];
  const edge = { left: 44, right: 16, top: 12 + 14 * yName.length, bottom: 32 + 14 * xName.length };
  const xs = [...points.map((p) => p.x), ...(spec.dense ? [spec.dense.x] : [])];
  const pad = (Math.max(...xs) - Math.min(...xs)) * 0.06 || 0.05;
  const [low, high] = [Math.min(...xs) - pad, Math.max(...xs) + pad];
  const ys = points.flatMap((p) => [p.y, ...(p.ys ?? [])]).concat(spec.dense ? [spec.dense.y] : []);
  const by = spec.root ? bend : straight;
  const span = by(Math.max(...ys)) - by(Math.min(...ys)) || 0.1;
  const [bottom, top] = [by(Math.min(...ys)) - 0.08 * span, by(Math.max(...ys)) + 0.06 * span];
  const x = (v) => edge.left + ((v - low) / (high - low)) * (width - edge.left - edge.right);
  const y = (v) => edge.top + ((top - by(v)) / (top - bottom)) * (height - edge.top - edge.bottom);
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  const text = (content, at, name, anchor) => svg.append(drawn("text", { ...at, class: name, "text-anchor": anchor }, content));
  const yTicks = spec.root ? TICKS_Y.filter((t) => by(t) >= bottom && by(t) <= top) : ticks(bottom, top, 7);
  for (const tick of yTicks) {
    svg.append(drawn("line", { x1: edge.left, x2: width - edge.right, y1: y(tick), y2: y(tick), class: tick ? "grid" : "base" }));
    text(String(tick), { x: edge.left - 8, y: y(tick) + 4 }, "tick", "end");
  }
  for (const tick of ticks(low, high, width < 500 ? 5 : 8)) {
    svg.append(drawn("line", { x1: x(tick), x2: x(tick), y1: height - edge.bottom, y2: height - edge.bottom + 4, class: "base" }));
    text(spec.shownX(tick), { x: x(tick), y: height - edge.bottom + 18 }, "tick", "middle");
  }
  xName.forEach((line, i) => text(line, { x: (edge.left + width - edge.right) / 2, y: height - 6 - 14 * (xName.length - 1 - i) }, "axis", "middle"));
  yName.forEach((line, i) => text(line, { x: 0, y: 12 + 14 * i }, "axis", "start"));
  if (spec.front) {
    const best = front([...points, ...(spec.dense ? [spec.dense] : [])]);
    svg.append(drawn("path", { d: `M${best.map((p) => `${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}`).join("L")}`, class: "front" }));
  }
  if (spec.limit?.length) {
    svg.append(drawn("path", { d: `M${spec.limit.map(([a, b]) => `${x(a).toFixed(1)},${y(b).toFixed(1)}`).join("L")}`, class: "limit" }));
  }
  for (const series of spec.series) svg.append(drawSeries(svg, series, x, y));
  if (spec.dense) {
    const dense = drawn("g", { transform: `translate(${x(spec.dense.x)},${y(spec.dense.y)})` }, marker("dense", 4.5));
    svg.append(dense);
    text("dense", { x: x(spec.dense.x) + 9, y: y(spec.dense.y) - 7 }, "tick", "start");
  }
}

function drawSeries(svg, { method, points }, x, y) {
  const group = drawn("g", { class: "series", "data-method": method });
  const colour = colourOf(method);
  const path = points.map((p) => `${x(p.x).toFixed(1)},${y(p.y).toFixed(1)}`).join("L");
  const look = data.looks[method] ?? [];
  const line = drawn("path", { d: `M${path}`, class: "line", "stroke-dasharray": look[3] ?? "" });
  line.style.stroke = colour;
  line.style.strokeWidth = (look[4] ?? 1.4) * 1.25;
  group.append(line);
  for (const point of points) {
    const bars = [];
    if (point.xs) bars.push(drawn("line", { x1: x(point.xs[0]), x2: x(point.xs[1]), y1: y(point.y), y2: y(point.y), class: "bar" }));
    if (point.ys) bars.push(drawn("line", { x1: x(point.x), x2: x(point.x), y1: y(point.ys[0]), y2: y(point.ys[1]), class: "bar" }));
    for (const bar of bars) bar.style.stroke = colour;
    const made = drawn("g", { class: "point", tabindex: 0, role: "button", "aria-label": point.label });
    made.setAttribute("transform", `translate(${x(point.x).toFixed(1)},${y(point.y).toFixed(1)})`);
    made.append(drawn("circle", { r: 11, class: "hit" }), marker(method, 4.5));
    explain(made, point.name, () => point.lines, () => point.cells());
    group.append(...bars, made);
  }
  const highlight = (on) => svg.classList.toggle("dimmed", on);
  group.addEventListener("pointerenter", () => (group.classList.add("on"), highlight(true)));
  group.addEventListener("pointerleave", () => (group.classList.remove("on"), highlight(false)));
  return group;
}

function rowsOf(folder, model, method, metric, at, dtype) {
  return rows.value
    .map((_, row) => row)
    .filter(
      (row) =>
        rows.target[row] === at && rows.folder[row] === folder && get("method", row) === method &&
        get("metric", row) === metric && get("model", row) === model && (!dtype || get("dtype", row) === dtype),
    );
}

// A legend whose entries choose what is shown everywhere.
function drawLegend(host, methods, on, changed) {
  byId(host).replaceChildren(
    ...methods.map((method) => {
      const button = element("button", { type: "button", "aria-pressed": on.has(method) }, swatch(method, true), method);
      const light = (lit) => {
        for (const group of document.querySelectorAll(`.chart [data-method="${CSS.escape(method)}"]`)) {
          group.classList.toggle("on", lit);
          group.parentNode.classList.toggle("dimmed", lit);
        }
      };
      button.addEventListener("click", () => {
        if (!on.delete(method)) on.add(method);
        changed();
        byId(host).querySelectorAll("button")[methods.indexOf(method)]?.focus();
      });
      button.addEventListener("pointerenter", () => light(true));
      button.addEventListener("pointerleave", () => light(false));
      return button;
    }),
  );
}
