// Tables: one of all numbers, a line a method and a column a target, and those of the studies as they are.

const PAGE = 60;
const asColumns = new Set(); // texts that are columns of their own, behind the numbers; others stand below the method
const order = { column: null, down: false };
let limit = PAGE;

const TEXTS = [
  ["method", "Method", (m) => m],
  ["folder", "Folder", (f) => f],
  ["model", "Model", shortModel],
  ["metric", "Metric", metricName],
  ["tokens", "Sparse tokens", policyName],
  ["dtype", "dtype", (d) => d],
];

const nameOf = (column, row) => (column === "folder" ? data.folders[rows.folder[row]].name : get(column, row));

// Lines of the table: everything but target and seed is the same in a line.
const lines = (() => {
  const found = new Map();
  rows.value.forEach((_, row) => {
    const key = TEXTS.map(([column]) => rows[column][row]).join();
    if (!found.has(key)) {
      const names = Object.fromEntries(TEXTS.map(([column]) => [column, nameOf(column, row)]));
      const words = [...Object.values(names), metricName(names.metric), data.folders[rows.folder[row]].title];
      const place = ["folder", "model", "tokens", "dtype", "metric", "method"].map((column) => rows[column][row]);
      found.set(key, { names, place, words: words.join(" ").toLowerCase(), cells: new Map() });
    }
    const { cells } = found.get(key);
    const at = rows.target[row];
    cells.set(at, [...(cells.get(at) ?? []), row]);
  });
  const differing = (a, b) => a.place.map((p, i) => p - b.place[i]).find((d) => d) ?? 0;
  return [...found.values()].sort(differing); // what can be compared stands together
})();

const searched = (words, q) => {
  const terms = q.toLowerCase().split(",").map((term) => term.trim()).filter(Boolean);
  return !terms.length || terms.some((term) => words.includes(term));
};

const isStudy = (name) => data.studies.some((study) => data.folders[study.folder].name === name);
const FILTERS = { suite: "folder", model: "model", metric: "metric", tokens: "tokens" };

// Lines that pass all filters, but for the one named `except`.
function passing(state, except = null) {
  const checks = Object.entries(FILTERS).filter(([name]) => name !== except && state[name]);
  return lines.filter(
    (line) =>
      isShown(line.names.method) && checks.every(([name, column]) => line.names[column] === state[name]) && searched(line.words, state.q ?? ""),
  );
}

// The dense model is the same at every target, and stands in every column.
const cellAt = (line, at) => line.cells.get(at) ?? (line.names.method === "dense" ? line.cells.get(0) : undefined);

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  const by = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
  return order.down ? -by : by;
}

function sortKey(line, column) {
  if (typeof column === "string") return TEXTS.find(([name]) => name === column)[2](line.names[column]);
  const cell = cellAt(line, column);
  return cell ? summary(cell).value : null;
}

// A header that sorts; `sorted` is called with whether it now goes down.
function sortable(label, active, down, chosen, className = "") {
  const button = element("button", { type: "button" }, label);
  button.append(element("span", { class: "arrow", "aria-hidden": "true" }, active ? (down ? "↓" : "↑") : "↕"));
  button.addEventListener("click", () => chosen(active && !down));
  const sort = active ? (down ? "descending" : "ascending") : "none";
  return element("th", { scope: "col", "aria-sort": sort, class: className }, button);
}

function numberCell(line, at) {
  const cell = cellAt(line, at);
  if (!cell) return element("td", { class: "n" });
  const { value } = summary(cell);
  const mark = Math.max(...cell.map((row) => rows.mark[row]));
  const off = value !== null && cell.some((row) => get("reason", row));
  const text = `${short(value)}${mark === 2 ? " ≈" : ""}${off ? " †" : ""}`;
  const shown = element("button", { type: "button", class: "number" }, short(value));
  if (mark === 1) shown.append(element("span", { class: "hidden" }, ", best"));
  if (mark === 2) shown.append(element("span", { class: "sign", "aria-label": ", within noise of the best" }, "≈"));
  if (off) shown.append(element("span", { class: "sign", "aria-label": ", off its target" }, "†"));
  const own = line.cells.has(at) && at ? ` at ${target(at)}` : "";
  explain(shown, `${line.names.method}${own}`, () => facts(cell), () => [cell]);
  return element("td", { class: `n${mark === 1 ? " best" : ""}`, "data-text": text }, shown);
}

function drawTable(state, again) {
  const found = passing(state);
  const sparse = found.filter((line) => line.names.method !== "dense");
  const targets = [...new Set((sparse.length ? sparse : found).flatMap((line) => [...line.cells.keys()]))];
  targets.sort((a, b) => a - b);
  // What is the same in every line is said once, above the table.
  const same = ([column]) => found.every((line) => line.names[column] === found[0].names[column]);
  const varying = TEXTS.filter((text) => text[0] === "method" || !same(text));
  const constant = TEXTS.filter((text) => !varying.includes(text));
  const columns = varying.filter(([name]) => name !== "method" && asColumns.has(name));
  const below = varying.filter((text) => text[0] !== "method" && !columns.includes(text));
  if (order.column !== null && !["method", ...columns.map(([name]) => name), ...targets].includes(order.column)) order.column = null;
  const sorted = [...found];
  if (order.column !== null) {
    const keys = new Map(found.map((line) => [line, sortKey(line, order.column)]));
    sorted.sort((a, b) => compare(keys.get(a), keys.get(b)));
  }
  const said = constant.map(([column, , format]) => (found.length ? format(found[0].names[column]) : "")).filter(Boolean);
  byId("table-caption").textContent = said.join(" · ") || (found.length ? "All numbers" : "");
  const choose = (column) => (down) => {
    Object.assign(order, { column, down });
    again(column);
  };
  const over = element("tr", { class: "over" }, element("td"));
  over.append(element("th", { scope: "colgroup", colspan: targets.length, class: "n" }, "at a target: the share of the blocks' weight bytes left unread"));
  if (columns.length) over.append(element("td", { colspan: columns.length }));
  const head = element("tr");
  const labelled = (label, column, name) => {
    const made = sortable(label, order.column === column, order.down, choose(column), name);
    made.dataset.label = typeof column === "number" ? `target ${label}` : label;
    return made;
  };
  head.append(labelled("Method", "method", ""));
  for (const at of targets) head.append(labelled(target(at), at, "n"));
  for (const [column, label] of columns) head.append(labelled(label, column, ""));
  const body = element("tbody");
  for (const line of sorted.slice(0, limit)) {
    const name = line.names.method;
    const made = element("tr", { "data-method": name });
    if (name === "dense") made.className = "dense";
    const first = element("th", { scope: "row" }, element("span", { class: "method" }, swatch(name), name));
    if (below.length) first.append(element("small", { class: "below" }, below.map(([column, , format]) => format(line.names[column])).filter(Boolean).join(" · ")));
    made.append(first);
    for (const at of targets) made.append(numberCell(line, at));
    for (const [column, , format] of columns) {
      made.append(element("td", { class: "text", title: line.names[column] }, format(line.names[column])));
    }
    body.append(made);
  }
  byId("table").replaceChildren(element("thead", {}, over, head), body);
  byId("scroll").hidden = byId("signs").hidden = !found.length;
  byId("more").hidden = found.length <= limit;
  byId("more").textContent = `Show all ${found.length} lines`;
  const count = found.reduce((sum, line) => sum + [...line.cells.values()].flat().length, 0);
  byId("status").textContent = found.length
    ? `${found.length} line${found.length > 1 ? "s" : ""}, ${count} number${count > 1 ? "s" : ""}`
    : isStudy(state.suite)
      ? "This suite is a study: its table stands below."
      : "Nothing passes these filters.";
}

function studyTable(study) {
  const table = element("table");
  const sort = { column: null, down: false };
  const texts = study.columns.map((_, i) => study.values[i].some((v) => typeof v === "string"));
  const method = study.columns.indexOf("method");
  const draw = (state, focus) => {
    let places = study.values[0].map((_, i) => i);
    if (method >= 0 && chosen.methods.size < known.length) places = places.filter((i) => isShown(study.values[method][i]));
    if (state.q) places = places.filter((i) => searched(study.values.map((c) => c[i]).join(" ").toLowerCase(), state.q));
    if (sort.column !== null) {
      const values = study.values[sort.column];
      places.sort((a, b) => {
        const by = typeof values[a] === "string" ? values[a].localeCompare(values[b]) : values[a] - values[b];
        return sort.down ? -by : by;
      });
    }
    const head = element("tr");
    study.columns.forEach((name, i) => {
      const chosen = (down) => {
        Object.assign(sort, { column: i, down });
        draw(state, i);
      };
      head.append(sortable(name.replaceAll("_", " "), sort.column === i, sort.down, chosen, texts[i] ? "" : "n"));
    });
    const body = element("tbody");
    for (const i of places) {
      const cells = study.values.map((column, c) => {
        const value = texts[c] ? (column[i] ?? "") : short(column[i]);
        return element("td", { class: texts[c] ? null : "n", title: texts[c] ? null : exact(column[i]) }, value);
      });
      body.append(element("tr", {}, ...cells));
    }
    table.replaceChildren(element("thead", {}, head), body);
    if (focus !== undefined) head.querySelectorAll("button")[focus].focus();
    return places.length;
  };
  return { table, draw };
}

const studies = data.studies.map((study) => {
  const folder = data.folders[study.folder];
  const { table, draw } = studyTable(study);
  const count = element("span", { class: "count" });
  const source = element("button", { type: "button", class: "quiet" }, "Where it comes from");
  source.addEventListener("click", () => openStudy(study));
  const box = element("div", { class: "scroll", role: "region", tabindex: 0, "aria-label": folder.name }, table);
  const about = element("p", { class: "note" }, `${folder.title}. `, source);
  const details = element("details", {}, element("summary", {}, folder.name, count), about, box);
  const update = (state) => {
    const shown = draw(state);
    count.textContent = `${shown} rows`;
    if (state.suite === folder.name) details.open = true;
    details.hidden = !shown || Boolean(state.suite && state.suite !== folder.name);
    return !details.hidden;
  };
  return { details, update };
});

// A table that stands in the page already.
function makeSortable(table) {
  const head = table.tHead.rows[0];
  const body = table.tBodies[0];
  const labels = [...head.cells].map((cell) => [cell.textContent, cell.className]);
  const draw = (chosen, down, focus) => {
    const headers = labels.map(([label, name], i) => sortable(label, i === chosen, down, (next) => draw(i, next, true), name));
    head.replaceChildren(...headers);
    if (chosen === null) return;
    const text = (row) => row.cells[chosen].textContent.trim();
    const sorted = [...body.rows].sort((a, b) => text(a).localeCompare(text(b), "en", { numeric: true }));
    body.replaceChildren(...(down ? sorted.reverse() : sorted));
    if (focus) headers[chosen].querySelector("button").focus();
  };
  draw(null, false, false);
}
