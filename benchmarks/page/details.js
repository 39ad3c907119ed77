// Where a number comes from: a short note beside it, and a dialog with all of it.

const tip = byId("tip");

function within(row) {
  const low = rows.low[row] ?? (rows.stderr[row] === null ? null : rows.value[row] - 1.96 * rows.stderr[row]);
  const high = rows.high[row] ?? (rows.stderr[row] === null ? null : rows.value[row] + 1.96 * rows.stderr[row]);
  return low === null ? null : [low, high];
}

// Of several seeds: the mean, and the spread over seeds.
function summary(cell) {
  const values = cell.map((row) => number(rows.value[row])).filter((v) => v !== null);
  if (!values.length) return { value: null, ends: null };
  const value = values.reduce((a, b) => a + b, 0) / values.length;
  if (values.length === 1) return { value, ends: within(cell.find((row) => rows.value[row] !== null)) };
  const spread = values.reduce((sum, v) => sum + (v - value) ** 2, 0) / (values.length - 1);
  const error = Math.sqrt(spread / values.length);
  return { value: Number(value.toPrecision(7)), ends: [value - 1.96 * error, value + 1.96 * error] };
}

function facts(cell) {
  const row = cell[0];
  const { value, ends } = summary(cell);
  const lines = [];
  if (value !== null) lines.push(["value", exact(value)]);
  if (ends) lines.push([cell.length > 1 ? "95 %, over seeds" : "95 %", interval(...ends)]);
  if (rows.loss[row] !== null) {
    const range = rows.loss_low[row] === null ? "" : ` ${interval(rows.loss_low[row], rows.loss_high[row])}`;
    lines.push(["nats above dense", `${short(rows.loss[row])}${range}`]);
  }
  if (rows.difference[row] !== null && get("method", row) !== "dense") {
    const range = interval(rows.difference_low[row], rows.difference_high[row]);
    lines.push(["difference to dense", `${short(rows.difference[row])} ${range}`]);
  }
  if (rows.byte_sparsity[row] !== null) lines.push(["bytes unread", exact(rows.byte_sparsity[row])]);
  if (rows.mark[row]) lines.push(["in its column", rows.mark[row] === 1 ? "the best" : "within noise of the best"]);
  if (get("reason", row)) lines.push([value === null ? "not measured" : "off target", get("reason", row)]);
  return lines;
}

function list(lines) {
  const out = element("dl");
  for (const [term, text] of lines) out.append(element("dt", {}, term), element("dd", {}, text));
  return out;
}

function showTip(anchor, title, lines) {
  tip.replaceChildren(element("strong", {}, title), list(lines));
  tip.hidden = false;
  anchor.setAttribute("aria-describedby", "tip");
  const box = anchor.getBoundingClientRect();
  const own = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, box.left + box.width / 2 - own.width / 2), innerWidth - own.width - 8);
  const above = box.top - own.height - 10;
  tip.style.left = `${Math.max(8, left)}px`;
  tip.style.top = `${above > 8 ? above : box.bottom + 10}px`;
}

function hideTip() {
  tip.hidden = true;
  document.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
}

// `anchor` shows `lines` while it is pointed at or has the focus, and opens what `cells` come from.
function explain(anchor, title, lines, cells) {
  const show = () => showTip(anchor, title, lines());
  anchor.addEventListener("pointerenter", show);
  anchor.addEventListener("focus", show);
  anchor.addEventListener("pointerleave", hideTip);
  anchor.addEventListener("blur", hideTip);
  anchor.addEventListener("click", () => openDetails(title, cells()));
  anchor.addEventListener("keydown", (event) => {
    if (anchor.tagName === "BUTTON" || !["Enter", " "].includes(event.key)) return;
    event.preventDefault();
    openDetails(title, cells());
  });
}

function part(title, lines) {
  return element("section", {}, element("h3", {}, title), list(lines.filter(([, text]) => text)));
}

function machineLines(place) {
  const machine = data.machines[place];
  const git = machine.git ?? {};
  const gpu = Object.entries(machine.gpu ?? {}).filter(([name]) => name !== "name");
  return [
    ["machine", machine.device && machine.device !== "cpu" ? `${machine.device}, ${machine.cpu}` : machine.cpu],
    ["cores, threads", `${machine.cores ?? "–"}, ${machine.threads ?? "–"}`],
    ["GPU", gpu.map(([name, value]) => `${name} ${value}`).join(", ")],
    ["instructions", machine.cpu_capability],
    ["date", machine.date],
    ["commit", `${git.commit ?? "unknown"}${git.dirty ? ", with changes" : ""}`],
    ["Python", machine.python],
    ["packages", Object.entries(machine.packages ?? {}).filter(([, v]) => v).map((p) => p.join(" ")).join(", ")],
  ];
}

function folderLines(folder, model) {
  const assets = Object.entries(folder.assets).map(([name, hash]) => `${name} ${hash.slice(0, 12)}…`);
  return [
    ["suite", `${folder.name}: ${folder.title}`],
    ["model", model ? model + (folder.models[model] ? `, sha256 ${folder.models[model].slice(0, 12)}…` : "") : ""],
    ["data", assets.join(", ")],
    ["again", folder.again],
  ];
}

function openDetails(title, cells) {
  hideTip();
  const body = [];
  for (const cell of cells) {
    const row = cell[0];
    const folder = data.folders[rows.folder[row]];
    body.push(part(metricName(get("metric", row)), facts(cell)));
    const kernel = get("metric", row).split("/")[0];
    const file = { decode: "decode.csv", kernel: "matrices.csv", codes: "quantised.csv" }[kernel] ?? "results.csv";
    const counted = get("metric", row).includes("/") ? "n, items" : "n, tokens";
    const seeds = cell.map((one) => rows.seed[one]).filter((seed) => seed !== null);
    const seconds = cell.map((one) => rows.seconds[one]).filter((s) => s !== null);
    body.push(
      part("The cell", [
        ["method", get("method", row)],
        ["target", target(rows.target[row])],
        ["sparse tokens", policyName(get("tokens", row))],
        ["dtype", get("dtype", row)],
        [seeds.length > 1 ? "seeds" : "seed", seeds.join(", ")],
        ["single values", cell.length > 1 ? cell.map((one) => exact(rows.value[one])).join(", ") : ""],
        ["standard error", cell.map((one) => rows.stderr[one]).filter((e) => e !== null).map(exact).join(", ")],
        [counted, [...new Set(cell.map((one) => rows.n[one]).filter((n) => n !== null))].join(", ")],
        ["seconds", seconds.join(", ")],
        ["file", `${folder.name}/${file}`],
      ]),
      part("The suite", folderLines(folder, get("model", row))),
    );
    const known = [...new Set(cell.map((one) => rows.machine[one]))];
    for (const place of known.includes(-1) ? folder.machines : known) {
      body.push(part(known.includes(-1) ? "One of the machines" : "Measured on", machineLines(place)));
    }
  }
  openDialog(title, body);
}

function openStudy(study) {
  const folder = data.folders[study.folder];
  const parts = folder.machines.map((place) => part("Measured on", machineLines(place)));
  openDialog(folder.name, [part("The suite", folderLines(folder, Object.keys(folder.models)[0])), ...parts]);
}

function openDialog(title, body) {
  byId("details-title").textContent = title;
  byId("details-body").replaceChildren(...body);
  byId("details").showModal();
  byId("details-body").scrollTop = 0;
}

byId("close").addEventListener("click", () => byId("details").close());
byId("details").addEventListener("click", (event) => {
  if (event.target === byId("details")) byId("details").close();
});
addEventListener("scroll", hideTip, { passive: true, capture: true });
addEventListener("keydown", (event) => event.key === "Escape" && hideTip());
