// Quality against measured speed, drawn to the width there is.

const hiddenMethods = new Set();
let panel = data.panels[0];

const TICKS_Y = [0, 0.02, 0.1, 0.25, 0.5, 1, 1.5, 2, 3];
// A square root keeps zero in the picture and the small losses apart.
const bend = (nats) => Math.sign(nats) * Math.sqrt(Math.abs(nats));

function ticks(low, high, most) {
  const step = [0.05, 0.1, 0.2, 0.25, 0.5, 1, 2, 5].find((s) => (high - low) / s <= most) ?? 10;
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, i) => (first + i) * step);
}

function rowsOf(folder, model, method, metric, at, dtype) {
  return rows.value
    .map((_, row) => row)
    .filter(
      (row) =>
        rows.target[row] === at && data.folders[rows.folder[row]].name === folder && get("method", row) === method &&
        get("metric", row) === metric && get("model", row) === model && (!dtype || get("dtype", row).startsWith(dtype)),
    );
}

function cellsOf(method, at) {
  const threads = `${panel.dtype}, ${panel.threads} thread`;
  const quality = rowsOf(panel.source, panel.of, method, `${panel.dataset}_perplexity`, at);
  const policy = get("tokens", quality[0]);
  return [
    rowsOf(panel.folder, panel.model, method, "decode/speedup", at, threads),
    quality.filter((row) => get("tokens", row) === policy),
  ].filter((cell) => cell.length);
}

function drawPicture() {
  if (!panel) return;
  const svg = byId("svg");
  const width = Math.max(300, byId("chart").clientWidth);
  const height = Math.round(Math.min(460, Math.max(330, width * 0.5)));
  const edge = { left: 46, right: 14, top: 26, bottom: 44 };
  const points = panel.series.flatMap((series) => series.points);
  const speeds = [1, ...points.map((p) => p[1])];
  const pad = (Math.max(...speeds) - Math.min(...speeds)) * 0.06 + 0.01;
  const [low, high] = [Math.min(...speeds) - pad, Math.max(...speeds) + pad];
  const top = bend(Math.max(...points.map((p) => p[4]), 0.1) * 1.08);
  const bottom = -0.09 * top;
  const x = (v) => edge.left + ((v - low) / (high - low)) * (width - edge.left - edge.right);
  const y = (v) => edge.top + ((top - bend(v)) / (top - bottom)) * (height - edge.top - edge.bottom);

  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("height", height);
  svg.replaceChildren();
  const text = (content, at, name, anchor) =>
    svg.append(drawn("text", { ...at, class: name, "text-anchor": anchor }, content));
  for (const tick of TICKS_Y.filter((t) => bend(t) <= top)) {
    svg.append(drawn("line", { x1: edge.left, x2: width - edge.right, y1: y(tick), y2: y(tick), class: tick ? "grid" : "base" }));
    text(String(tick), { x: edge.left - 8, y: y(tick) + 4 }, "tick", "end");
  }
  for (const tick of ticks(low, high, width < 500 ? 5 : 10)) {
    text(`${Number(tick.toFixed(2))}×`, { x: x(tick), y: height - edge.bottom + 18 }, "tick", "middle");
  }
  svg.append(drawn("line", { x1: x(1), x2: x(1), y1: edge.top, y2: height - edge.bottom, class: "grid" }));
  text("times faster than the fastest dense path", { x: (edge.left + width - edge.right) / 2, y: height - 6 }, "axis", "middle");
  text("nats a token above dense", { x: 0, y: 12 }, "axis", "start");
  text("better ↘", { x: width - edge.right, y: y(0) - 8 }, "axis", "end");

  const dense = drawn("g", { transform: `translate(${x(1)},${y(0)})`, class: "point", tabindex: 0, role: "img" });
  dense.setAttribute("aria-label", "dense: 1 times, 0 nats");
  dense.append(marker("dense", 5));
  for (const series of panel.series) svg.append(drawSeries(series, x, y, series === panel.series[0]));
  svg.append(dense);
  text("dense", { x: x(1) - 10, y: y(0) + 15 }, "tick", "end");
  dense.addEventListener("pointerenter", () => showTip(dense, "dense", [["speed", "1×"], ["nats above dense", "0"]]));
  dense.addEventListener("pointerleave", hideTip);
  dense.addEventListener("focus", () => showTip(dense, "dense", [["speed", "1×"], ["nats above dense", "0"]]));
  dense.addEventListener("blur", hideTip);
}

// The first one has its targets written beside it; those of the others are at about the same bytes.
function drawSeries({ method, points }, x, y, named) {
  const group = drawn("g", { class: "series", "data-method": method });
  if (hiddenMethods.has(method)) group.setAttribute("display", "none");
  const colour = colourOf(method);
  const path = points.map((p) => `${x(p[1]).toFixed(1)},${y(p[4]).toFixed(1)}`).join("L");
  const line = drawn("path", { d: `M${path}`, class: "line", "stroke-dasharray": data.looks[method]?.[3] ?? "" });
  line.style.stroke = colour;
  group.append(line);
  for (const [at, speed, fast, faster, nats, least, most, bytes] of points) {
    const bars = [];
    if (fast !== null) bars.push(drawn("line", { x1: x(fast), x2: x(faster), y1: y(nats), y2: y(nats), class: "bar" }));
    if (least !== null) bars.push(drawn("line", { x1: x(speed), x2: x(speed), y1: y(least), y2: y(most), class: "bar" }));
    for (const bar of bars) bar.style.stroke = colour;
    const name = `${method} at ${target(at)}`;
    const label = `${name}: ${short(speed)} times, ${short(nats)} nats above dense`;
    const point = drawn("g", { class: "point", tabindex: 0, role: "button", "aria-label": label });
    point.setAttribute("transform", `translate(${x(speed).toFixed(1)},${y(nats).toFixed(1)})`);
    point.append(drawn("circle", { r: 11, class: "hit" }), marker(method, 4.5));
    const lines = () => [
      ["speed", `${short(speed)}×${fast === null ? "" : ` ${interval(fast, faster)}`}`],
      ["nats above dense", `${short(nats)}${least === null ? "" : ` ${interval(least, most)}`}`],
      ["bytes unread", short(bytes)],
    ];
    explain(point, name, lines, () => cellsOf(method, at));
    group.append(...bars, point);
    if (named) group.append(drawn("text", { x: x(speed) + 8, y: y(nats) + 17, class: "target" }, target(at)));
  }
  const highlight = (on) => byId("svg").classList.toggle("dimmed", on);
  group.addEventListener("pointerenter", () => (group.classList.add("on"), highlight(true)));
  group.addEventListener("pointerleave", () => (group.classList.remove("on"), highlight(false)));
  return group;
}

function drawLegend() {
  byId("legend").replaceChildren(
    ...panel.series.map(({ method }) => {
      const shown = !hiddenMethods.has(method);
      const button = element("button", { type: "button", "aria-pressed": shown }, swatch(method, true), method);
      const group = () => byId("svg").querySelector(`[data-method="${CSS.escape(method)}"]`);
      const light = (on) => {
        byId("svg").classList.toggle("dimmed", on && !hiddenMethods.has(method));
        group()?.classList.toggle("on", on);
      };
      button.addEventListener("click", () => {
        if (!hiddenMethods.delete(method)) hiddenMethods.add(method);
        button.setAttribute("aria-pressed", !hiddenMethods.has(method));
        light(false);
        drawPicture();
      });
      button.addEventListener("pointerenter", () => light(true));
      button.addEventListener("pointerleave", () => light(false));
      return button;
    }),
  );
}

function describePicture() {
  const out = [
    `Down and to the right is better; a method's points are its targets, the shares of weight bytes left unread. Losses: log of the perplexity over the dense ` +
      `one on ${panel.dataset}, from ${panel.source}, on a square-root scale. Times: ${panel.folder}, ${panel.place}. ` +
      "Bars are 95\u00a0% intervals.",
  ];
  if (panel.of !== panel.model) {
    out.push(`The timed model has random weights, so that it has a time and no quality: the losses are those of ${shortModel(panel.of)} at the same method and target.`);
  }
  if (panel.left_out.length) {
    const names = panel.left_out.map(([method, at, nats]) => `${method} at ${target(at)} (${short(nats)})`);
    out.push(`Above ${data.ceiling} nats, and not drawn: ${names.join(", ")}.`);
  }
  if (panel.without.length) out.push(`Timed, but without a loss in ${panel.source}: ${panel.without.join(", ")}.`);
  byId("picture-note").textContent = out.join(" ");
}

function choosePanel(id) {
  panel = data.panels.find((one) => one.id === id) ?? data.panels[0];
  if (!panel) return;
  byId("panel").value = panel.id;
  drawLegend();
  describePicture();
  drawPicture();
}

function setUpPicture() {
  byId("picture").hidden = !data.panels.length;
  if (!data.panels.length) return;
  byId("panel").replaceChildren(...data.panels.map((one) => element("option", { value: one.id }, one.label)));
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.round(entry.contentRect.width) === width) return;
    width = Math.round(entry.contentRect.width);
    drawPicture();
  }).observe(byId("chart"));
}
