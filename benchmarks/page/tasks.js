// Means and ranks over tasks, and what every method is.

const taskOrder = { column: "mean", down: false };
const taskColumns = new Set(["mean", "gap", "rank", "each"]);

function drawTasks(focus) {
  const one = data.tasks[Number(byId("task-table").value)];
  if (!one) return;
  const at = Number(byId("task-target").value);
  const lines = one.lines.filter((line) => line[1] === at && isShown(line[0]));
  const columns = [
    ["mean", "Mean accuracy (%) ↑", (l) => l[2], (l) => (100 * l[2]).toFixed(1), -1, "mean"],
    ["gap", "Difference to dense (points)", (l) => l[2], (l) => `${(100 * (l[2] - one.dense[0])).toFixed(1)} [${(100 * (l[3] - one.dense[0])).toFixed(1)}, ${(100 * (l[4] - one.dense[0])).toFixed(1)}]${l[5] ? " ≈" : ""}`.replaceAll("-", "−"), -1, "gap"],
    ["rank", "Mean rank ↓", (l) => l[6], (l) => l[6].toFixed(2), 1, "rank"],
    ...one.tasks.map((task, i) => [`t${i}`, `${task.replaceAll("_", " ")} (%, ${one.items[task]} items)`, (l) => l[7 + i], (l) => (100 * l[7 + i]).toFixed(1), -1, "each"]),
  ].filter(([, , , , , group]) => taskColumns.has(group));
  const by = columns.find(([id]) => id === taskOrder.column) ?? columns[0];
  if (by) lines.sort((a, b) => (by[2](a) - by[2](b)) * by[4] * (taskOrder.down ? -1 : 1));
  const head = element("tr", {}, element("th", { scope: "col" }, "Method"));
  for (const column of columns) {
    const active = column === by;
    const made = sortable(column[1], active, active && taskOrder.down, (down) => {
      Object.assign(taskOrder, { column: column[0], down });
      drawTasks(column[0]);
    }, "n");
    made.dataset.label = column[1];
    made.dataset.id = column[0];
    head.append(made);
  }
  const body = element("tbody");
  const row = (method, cells, best = []) =>
    element("tr", { "data-method": method, class: method === "dense" ? "dense" : null },
      element("th", { scope: "row" }, element("span", { class: "method" }, swatch(method, true), method)),
      ...cells.map((cell, i) => element("td", { class: `n${best[i] ? " best" : ""}` }, best[i] ? element("b", {}, cell) : cell)));
  const dense = { mean: (100 * one.dense[0]).toFixed(1), gap: "–", rank: "–" };
  body.append(row("dense", columns.map(([id]) => dense[id] ?? (100 * one.dense[1 + Number(id.slice(1))]).toFixed(1))));
  const tops = columns.map(([id, , key, , way]) => (id === "gap" ? null : lines.length ? (way > 0 ? Math.min : Math.max)(...lines.map(key)) : null));
  for (const line of lines) body.append(row(line[0], columns.map(([, , , text]) => text(line)), columns.map(([, , key], i) => key(line) === tops[i])));
  byId("tasks-shown").replaceChildren(element("thead", {}, head), body);
  if (focus) byId("tasks-shown").querySelector(`th[data-id="${focus}"] button`)?.focus();
}

function setUpTasks() {
  byId("tasks").hidden = !data.tasks.length;
  if (!data.tasks.length) return;
  const targets = () => {
    const found = [...new Set(data.tasks[Number(byId("task-table").value)].lines.map((line) => line[1]))];
    const before = Number(byId("task-target").value) || 0.5;
    byId("task-target").replaceChildren(...found.map((t) => element("option", { value: t }, percent(1 - t))));
    byId("task-target").value = found.includes(before) ? before : found[0];
  };
  byId("task-table").replaceChildren(...data.tasks.map((one, i) => element("option", { value: i }, one.label)));
  byId("task-table").addEventListener("change", () => (targets(), drawTasks()));
  byId("task-target").addEventListener("change", () => drawTasks());
  targets();
  makePick("task-tools", "Columns", [["mean", "Mean accuracy"], ["gap", "Difference to dense"], ["rank", "Mean rank"], ["each", "Every task"]], taskColumns, () => drawTasks());
  downloads("task-tools", "tasks", () => shownTable(byId("tasks-shown"), `${data.tasks[Number(byId("task-table").value)].label}, target ${byId("task-target").value}`));
  drawTasks();
}

function setUpMethods() {
  byId("methods").hidden = !data.methods.length;
  const link = (href, text) => (href ? element("a", { href, rel: "noreferrer" }, text) : "");
  byId("method-list").tBodies[0].replaceChildren(
    ...data.methods.map(({ name, line, paper, arxiv, code }) => {
      const label = data.looks[name] ? name : (known.find((m) => m.startsWith(`${name}(`)) ?? name);
      const mark = element("span", { class: "method" }, swatch(label, true), name);
      const cells = [line || "Measured elsewhere, by a method that is not in this repository.", link(paper, `arXiv ${arxiv}`), link(code, code.split("/").slice(-2).join("/"))];
      return element("tr", {}, element("th", { scope: "row" }, mark), ...cells.map((cell) => element("td", {}, cell)));
    }),
  );
}
