// The first table: what every method loses at some bytes and at some speed, and what it reaches within some loss.

const board = () => data.boards[chosen.board];
const timing = () => (chosen.timed === null ? null : data.timed[chosen.timed]);
const percent = (share, digits = 0) => `${(100 * share).toFixed(digits)}\u00a0%`.replace("-", "−");
const source = (place) => data.folders[place].name;
// What knows more than a method can is shown, and is never the best.
const bounds = new Set(data.methods.filter((m) => m.bound).map((m) => m.name));
const isBound = (method) => bounds.has(method.split(",")[0]);

// Points of a board by method, each with the speed of the same model at the same method and target.
function pointsOf(one) {
  const speeds = new Map((timing()?.points ?? []).map((p) => [`${p[0]} ${p[1]}`, p]));
  const out = new Map();
  for (const [method, at, bytes, nats, low, high, seeds, folder] of one.points) {
    const timed = speeds.get(`${method} ${at}`);
    const point = { method, at, bytes, nats: number(nats), low, high, seeds, folder, speed: timed?.[2] ?? null, timed };
    out.set(method, [...(out.get(method) ?? []), point]);
  }
  return out;
}

const least = (points) => points.reduce((a, b) => (a === null || b.nats < a.nats ? b : a), null);
const most = (points, key) => points.reduce((a, b) => (a === null || b[key] > a[key] ? b : a), null);

// What every method is at the three limits that are set.
function standings() {
  const base = (method) => (/^[^(,]+\((.*)\)$/.exec(method) ?? [])[1];
  const found = [...pointsOf(board())].map(([method, points]) => {
    const within = points.filter((p) => p.nats <= chosen.nats);
    return {
      method, points,
      atBytes: least(points.filter((p) => p.at >= chosen.bytes - 1e-9)),
      atSpeed: least(points.filter((p) => p.speed !== null && p.speed >= chosen.speed)),
      // Of points at one target, measured bytes differ by rounding alone: the one that loses least is the best.
      fewest: most(within.map((p) => ({ ...p, rank: 1e3 * p.at - p.nats })), "rank"),
      fastest: most(within.filter((p) => p.speed !== null), "speed"),
      timed: points.some((p) => p.speed !== null),
      base: base(method),
    };
  });
  const byMethod = new Map(found.map((one) => [one.method, one]));
  for (const one of found) {
    const under = byMethod.get(one.base);
    one.over = under?.atBytes && one.atBytes && one.atBytes.at === under.atBytes.at ? 1 - one.atBytes.nats / under.atBytes.nats : null;
  }
  return found.filter((one) => isShown(one.method) && (chosen.variants || !isVariant(one.method)));
}

const COLUMNS = [
  { id: "atBytes", head: () => `Loss, reading ≤ ${percent(1 - chosen.bytes)} of the bytes (nats/token)`, key: (o) => o.atBytes?.nats, better: -1, text: (o) => o.atBytes && short(o.atBytes.nats), point: (o) => o.atBytes },
  { id: "over", head: () => "Of its base's loss gone (%)", key: (o) => o.over, better: 0, text: (o) => o.over !== null && `${(100 * o.over).toFixed(0).replace("-", "−")} of ${o.base}`, point: (o) => o.atBytes },
  { id: "atSpeed", head: () => `Loss, at ≥ ${chosen.speed.toFixed(2)} times the dense speed (nats/token)`, key: (o) => o.atSpeed?.nats, better: -1, text: (o) => (o.atSpeed ? short(o.atSpeed.nats) : o.timed ? "–" : "not timed"), point: (o) => o.atSpeed },
  { id: "fewest", head: () => `Bytes read, losing ≤ ${chosen.nats.toFixed(2)} nats (%)`, key: (o) => o.fewest?.rank, better: 1, text: (o) => o.fewest && (100 * (1 - o.fewest.bytes)).toFixed(1), point: (o) => o.fewest },
  { id: "fastest", head: () => `Speed, losing ≤ ${chosen.nats.toFixed(2)} nats (× dense)`, key: (o) => o.fastest?.speed, better: 1, text: (o) => (o.fastest ? `${o.fastest.speed.toFixed(2)}×` : o.timed ? "–" : "not timed"), point: (o) => o.fastest },
  { id: "seeds", head: () => "Seeds", key: (o) => o.points[0].seeds, better: 0, text: (o) => String(o.points[0].seeds) },
  { id: "from", head: () => "Losses from", key: (o) => source(o.points[0].folder), better: 0, text: (o) => source(o.points[0].folder), left: true },
];
const shownColumns = new Set(["atBytes", "over", "atSpeed", "fewest", "fastest", "from"]);
const bestOrder = { id: "atBytes", down: false };

function pointLines(p) {
  const lines = [
    ["target", target(p.at)],
    ["loss", `${short(p.nats)} ${p.low === null ? "" : interval(p.low, p.high)} nats/token`],
    ["bytes left unread", percent(p.bytes, 1)],
  ];
  if (p.timed) lines.push(["speed", `${short(p.speed)}× dense${p.timed[3] === null ? "" : ` ${interval(p.timed[3], p.timed[4])}`}`]);
  if (p.timed?.[7]) lines.push(["weights read", `${short(p.timed[7])} MB/token`]);
  return [...lines, ["losses from", source(p.folder)]];
}

function pointCells(p) {
  const one = board();
  const cells = one.texts.map((text) => rowsOf(p.folder, one.model, p.method, `${text}_perplexity`, p.at));
  if (p.timed) cells.push(rowsOf(timing().folder, timing().model, p.method, "decode/speedup", p.at, timing().dtype));
  // A folder has further token policies beside that of the board.
  return cells.map((cell) => cell.filter((row) => ["", one.tokens, "one at a time"].includes(get("tokens", row)))).filter((c) => c.length);
}

function drawBest(focus) {
  const found = standings();
  const columns = COLUMNS.filter(({ id }) => shownColumns.has(id));
  const sortBy = columns.find(({ id }) => id === bestOrder.id) ?? columns[0];
  const value = (one) => sortBy?.key(one) ?? null;
  const sorted = [...found].sort((a, b) => {
    const [left, right] = [value(a), value(b)];
    if (left === null || right === null) return (left === null) - (right === null);
    const by = typeof left === "string" ? left.localeCompare(right) : (left - right) * (sortBy.better > 0 ? -1 : 1);
    return bestOrder.down ? -by : by;
  });
  const head = element("tr", {}, element("th", { scope: "col" }, "Method"));
  for (const column of columns) {
    const active = column === sortBy;
    const made = sortable(column.head(), active, active && bestOrder.down, (down) => {
      Object.assign(bestOrder, { id: column.id, down });
      drawBest(column.id);
    }, column.left ? "" : "n");
    made.dataset.label = column.head();
    made.dataset.id = column.id;
    head.append(made);
  }
  const best = new Map(
    columns.filter(({ better }) => better).map((column) => {
      const values = found.filter((one) => !isBound(one.method)).map((one) => column.key(one)).filter((v) => v !== null && v !== undefined);
      return [column.id, values.length ? (column.better > 0 ? Math.max(...values) : Math.min(...values)) : null];
    }),
  );
  const body = element("tbody");
  for (const one of sorted) {
    const row = element("tr", { "data-method": one.method });
    row.append(element("th", { scope: "row" }, element("span", { class: "method" }, swatch(one.method, true), isBound(one.method) ? `${one.method} (a bound)` : one.method)));
    for (const column of columns) {
      const text = column.text(one) || "–";
      const point = column.point?.(one);
      const wins = best.has(column.id) && !isBound(one.method) && best.get(column.id) !== null && column.key(one) === best.get(column.id);
      const cell = element("td", { class: `${column.left ? "" : "n"}${wins ? " best" : ""}` });
      if (point) {
        const button = element("button", { type: "button", class: "number" }, text);
        if (wins) button.append(element("span", { class: "hidden" }, ", best"));
        cell.dataset.text = text;
        explain(button, `${one.method} at ${target(point.at)}`, () => pointLines(point), () => pointCells(point));
        cell.append(button);
      } else {
        cell.append(text);
        if (text === "–" || text === "not timed") cell.classList.add("none");
      }
      row.append(cell);
    }
    body.append(row);
  }
  byId("best").replaceChildren(element("thead", {}, head), body);
  byId("best-empty").hidden = Boolean(found.length);
  if (focus) byId("best").querySelector(`th[data-id="${focus}"] button`)?.focus();
  drawAnswers(found);
  drawPictures();
}

const bold = (text) => element("b", {}, text);
const named = (method) => element("span", { class: "method" }, swatch(method), bold(method));

function drawAnswers(found) {
  const one = board();
  const bestOf = (key) => least(found.filter((o) => !isBound(o.method)).map((o) => o[key]).filter(Boolean));
  const bytes = bestOf("atBytes");
  const speed = bestOf("atSpeed");
  const untimed = found.filter((o) => !o.timed).map((o) => o.method);
  const say = (id, ...parts) => byId(id).replaceChildren(...parts);
  if (bytes) say("answer-bytes", named(bytes.method), ` loses ${short(bytes.nats)} nats/token, reading ${percent(1 - bytes.bytes)} of the block weights.`);
  else say("answer-bytes", "No method shown reads so little.");
  if (!timing()) say("answer-speed", "No speed of this model was measured.");
  else if (speed) {
    say("answer-speed", named(speed.method), ` loses ${short(speed.nats)} nats/token at ${speed.speed.toFixed(2)}×, on ${timing().setting}.`);
    if (untimed.length) byId("answer-speed").append(` Not timed: ${untimed.length > 3 ? `${untimed.length} methods` : untimed.join(", ")}.`);
  } else say("answer-speed", `No method shown is ${chosen.speed.toFixed(2)} times as fast.`);
  // Of all that SPON was put over, the sparsifier that most wraps of it were measured over.
  const over = found.filter((o) => /^spon/.test(o.method) && !isVariant(o.method) && o.over !== null);
  const bases = over.map((o) => o.base);
  const base = [...new Set(bases)].sort((a, b) => bases.filter((v) => v === b).length - bases.filter((v) => v === a).length)[0];
  const under = found.find((o) => o.method === base)?.atBytes ?? pointsOf(one).get(base)?.find((p) => p.at >= chosen.bytes - 1e-9);
  if (under) {
    const steps = over.filter((o) => o.base === base).flatMap((o) => [" → ", bold(short(o.atBytes.nats)), ` ${o.method.split("(")[0]} (−${(100 * o.over).toFixed(0)}\u00a0%)`.replace("−-", "+")]);
    say("answer-spon", "Nats/token at equal bytes: ", bold(short(under.nats)), ` ${base}`, ...steps, ".");
  } else say("answer-spon", "SPON and its base are not both shown here.");
  const machine = timing() ? `Speed: ${timing().setting}.` : "";
  say("answer-where", bold(one.model), `. Loss: ${one.dtype}, ${one.texts.join(", ")}. ${machine}`);
  const method = bytes?.method ?? "teal";
  const at = bytes?.at ?? chosen.bytes;
  const fits = method.includes(",") ? method.split(",")[0] : method;
  // An option and its value stay in one line.
  const words = ["resting fit", "--model MODEL", `--method "${fits}"`, `--target ${at}`, "-o plan"];
  byId("answer-run").replaceChildren(...words.flatMap((word, i) => [i ? " " : "", element("span", {}, word)]));
}

function chartPoint(p, x, xs, what) {
  return {
    x, xs, y: p.nats, ys: p.low === null ? null : [p.low, p.high], name: `${p.method} at ${target(p.at)}`,
    label: `${p.method} at ${target(p.at)}: ${short(p.nats)} nats, ${what}`, lines: pointLines(p), cells: () => pointCells(p),
  };
}

function drawPictures() {
  const one = board();
  const found = pointsOf(one);
  const methods = [...found.keys()].filter((m) => chosen.variants || !isVariant(m));
  const ordered = known.filter((m) => methods.includes(m));
  const drawnOf = (make) =>
    ordered.filter(isShown)
      .map((method) => ({ method, points: found.get(method).filter((p) => p.nats <= data.ceiling).sort((a, b) => a.at - b.at).map(make).filter(Boolean) }))
      .filter((series) => series.points.length);
  const losses = `nats/token above dense, ${shortModel(one.model)} in ${one.dtype}`;
  drawChart("chart-bytes", {
    title: "Loss against bytes", y: losses, x: "weight bytes of the blocks left unread (%), measured", root: true, front: chosen.front,
    shownX: (v) => String(Math.round(100 * v)),
    series: drawnOf((p) => chartPoint(p, p.bytes, null, `${percent(p.bytes)} unread`)),
  });
  const setting = timing();
  drawChart("chart-speed", {
    title: "Loss against speed", y: losses, x: setting ? `times as fast as dense, ${shortModel(setting.model)} in ${setting.dtype}` : "", root: true,
    front: chosen.front, shownX: (v) => `${Number(v.toFixed(2))}×`, dense: { x: 1, y: 0 },
    empty: setting ? "None of the methods shown was timed." : `No speed of ${shortModel(one.model)} was measured, and that of another model is not drawn against its losses.`,
    series: drawnOf((p) => p.timed && chartPoint(p, p.speed, p.timed[3] === null ? null : [p.timed[3], p.timed[4]], `${short(p.speed)} times`)),
  });
  drawLegend("legend", ordered, chosen.methods, changedMethods);
  const out = [...found.values()].flat().filter((p) => p.nats > data.ceiling && isShown(p.method) && (chosen.variants || !isVariant(p.method)));
  const notes = [
    `Down and to the right is better; a method's points are its targets. Losses: log of the perplexity over the dense one, mean over ${one.texts.join(", ")} (${one.scored.toLocaleString("en")} tokens), on a square-root scale, from ${one.folders.map(source).join(", ")}. Bars: 95\u00a0% intervals. The broad line is the Pareto front.`,
  ];
  if (out.length) notes.push(`Above ${data.ceiling} nats, and not drawn: ${out.map((p) => `${p.method} at ${target(p.at)} (${short(p.nats)})`).join(", ")}.`);
  byId("picture-note").textContent = notes.join(" ");
}

// Speed against bytes of whatever was timed, shapes with random weights as well.
function drawSpeeds() {
  const one = data.timed[Number(byId("speed-setting").value)];
  if (!one) return;
  const names = known.filter((m) => one.points.some((p) => p[0] === m) && isShown(m));
  const limit = [...new Map(one.points.filter((p) => p[6] !== null).map((p) => [p[5], p[6]]))].sort((a, b) => a[0] - b[0]);
  drawChart("chart-time", {
    title: "Speed against bytes", y: `times as fast as dense, ${shortModel(one.model)} in ${one.dtype}`, x: "weight bytes of the blocks left unread (%), measured",
    shownX: (v) => String(Math.round(100 * v)), limit,
    series: names.map((method) => ({
      method,
      points: one.points.filter((p) => p[0] === method).map((p) => ({
        x: p[5], y: p[2], ys: p[3] === null ? null : [p[3], p[4]], name: `${method} at ${target(p[1])}`,
        label: `${method} at ${target(p[1])}: ${short(p[2])} times`,
        lines: [["speed", `${short(p[2])}× dense${p[3] === null ? "" : ` ${interval(p[3], p[4])}`}`], ["limit", p[6] === null ? "–" : `${short(p[6])}×`], ["bytes left unread", percent(p[5], 1)], ["tokens/s", short(p[8])], ["weights read", `${short(p[7])} MB/token`]],
        cells: () => [rowsOf(one.folder, one.model, method, "decode/speedup", p[1], one.dtype)].filter((c) => c.length),
      })),
    })),
  });
  byId("speed-note").textContent =
    `Grey: the limit that bytes set. ${one.random ? "These weights are random in a published shape, so that they have a speed and no loss. " : ""}From ${source(one.folder)}. Dense is the fastest dense path of the machine.`;
}

function slider(id, apply, shown, values) {
  const input = byId(id);
  const set = () => {
    const value = values ? values()[Number(input.value)] : Number(input.value);
    apply(value);
    byId(`${id}-shown`).textContent = shown(value);
    input.setAttribute("aria-valuetext", shown(value));
  };
  input.addEventListener("input", () => {
    set();
    drawBest();
    toHash();
  });
  return set;
}

const targetsOf = () => [...new Set(board().points.map((p) => p[1]))].filter((t) => t > 0).sort((a, b) => a - b);
const setters = {};

// After another board or another machine: sliders go over what it has.
function choose({ place = chosen.board, timed, keep = false }) {
  chosen.board = place;
  const one = board();
  const select = byId("timed-on");
  select.replaceChildren(...one.timed.map((t) => element("option", { value: t }, data.timed[t].setting)));
  if (!one.timed.length) select.append(element("option", { value: "" }, "not timed"));
  chosen.timed = one.timed.includes(timed) ? timed : (one.timed[0] ?? null);
  select.value = chosen.timed ?? "";
  select.disabled = one.timed.length < 2;
  byId("board").value = String(place);
  const targets = targetsOf();
  byId("at-bytes").max = targets.length - 1;
  const near = targets.reduce((a, b) => (Math.abs(b - chosen.bytes) < Math.abs(a - chosen.bytes) ? b : a), targets[0]);
  byId("at-bytes").value = targets.indexOf(near);
  byId("at-speed").disabled = chosen.timed === null;
  if (!keep) byId("at-speed").value = Math.min(chosen.speed, 1.5);
  for (const set of Object.values(setters)) set();
  drawBest();
}

function setUpBest() {
  byId("find").hidden = !data.boards.length;
  byId("speeds").hidden = !data.timed.length;
  if (data.timed.length) {
    byId("speed-setting").replaceChildren(...data.timed.map((one, i) => element("option", { value: i }, `${one.label}${one.random ? " (random weights)" : ""}`)));
    byId("speed-setting").addEventListener("change", drawSpeeds);
  }
  if (!data.boards.length) return;
  byId("board").replaceChildren(...data.boards.map((one, i) => element("option", { value: i }, one.label)));
  byId("board").addEventListener("change", () => (choose({ place: Number(byId("board").value) }), toHash()));
  byId("timed-on").addEventListener("change", () => (choose({ timed: Number(byId("timed-on").value), keep: true }), toHash()));
  setters.bytes = slider("at-bytes", (v) => (chosen.bytes = v), (v) => `${percent(1 - v)} of the bytes`, targetsOf);
  setters.speed = slider("at-speed", (v) => (chosen.speed = v), (v) => `${v.toFixed(2)}× dense`);
  setters.nats = slider("at-nats", (v) => (chosen.nats = v), (v) => `${v.toFixed(2)} nats/token`);
  for (const [id, name] of [["variants", "variants"], ["front", "front"]]) {
    byId(id).addEventListener("change", () => {
      chosen[name] = byId(id).checked;
      drawBest();
    });
  }
  makePick("best-tools", "Columns", COLUMNS.map(({ id, head }) => [id, head()]), shownColumns, () => drawBest());
  downloads("best-tools", "best-methods", () => shownTable(byId("best"), `${board().label}; ${timing()?.setting ?? "not timed"}`));
  byId("copy").addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(byId("answer-run").textContent);
      byId("copy").textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(byId("answer-run"));
    }
  });
}
