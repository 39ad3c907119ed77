// Filters, the address of a view, the theme, and the start.

const NAMES = [...Object.keys(FILTERS), "q"];
const form = byId("filters");
let state = {};

// An address says everything: what it does not name is not filtered. Without one, the first view is shown.
function fromHash() {
  const hash = location.hash.slice(1);
  if (hash && document.getElementById(hash)) return; // a part of the page, no view
  const given = new URLSearchParams(hash);
  const view = hash ? Object.fromEntries(given) : (data.views[0]?.hash ?? {});
  state = Object.fromEntries(NAMES.filter((name) => view[name]).map((name) => [name, view[name]]));
  limit = PAGE;
  const column = given.get("sort");
  order.column = column === null ? null : TEXTS.some(([name]) => name === column) ? column : Number(column);
  order.down = given.get("order") === "down";
  const wanted = given.getAll("method");
  chosen.methods.clear();
  for (const method of known) if (!wanted.length || wanted.includes(method)) chosen.methods.add(method);
  if (data.boards.length) {
    const at = (name, otherwise) => (given.has(name) && Number.isFinite(Number(given.get(name))) ? Number(given.get(name)) : otherwise);
    chosen.bytes = at("bytes", chosen.bytes);
    for (const [id, name] of [["at-speed", "speed"], ["at-nats", "nats"]]) if (given.has(name)) byId(id).value = at(name, 0);
    const place = at("board", chosen.board);
    choose({ place: data.boards[place] ? place : 0, timed: given.has("on") ? at("on", 0) : (chosen.timed ?? undefined), keep: true });
  }
  draw();
  drawSpeeds();
  drawTasks();
  methodPick?.update();
}

function toHash() {
  const out = new URLSearchParams(NAMES.filter((name) => state[name]).map((name) => [name, state[name]]));
  if (order.column !== null) out.set("sort", order.column);
  if (order.column !== null && order.down) out.set("order", "down");
  if (chosen.methods.size < known.length) for (const method of chosen.methods) out.append("method", method);
  if (data.boards.length) {
    if (chosen.board) out.set("board", chosen.board);
    if (chosen.timed !== null && chosen.timed !== board().timed[0]) out.set("on", chosen.timed);
    for (const [name, usual] of [["bytes", 0.5], ["speed", 1.5], ["nats", 0.25]]) if (chosen[name] !== usual) out.set(name, chosen[name]);
  }
  history.replaceState(null, "", `#${out.toString() || "all"}`);
}

// Methods are chosen once, for all tables and pictures.
let methodPick = null;

function changedMethods() {
  toHash();
  methodPick?.update();
  if (data.boards.length) drawBest();
  drawSpeeds();
  drawTasks();
  draw();
}

const LABELS = { metric: metricName, tokens: policyName };

// A select offers what is there under the other filters, and what is chosen.
function fillSelect(name) {
  const select = form.elements[name];
  const values = [...new Set(passing({ ...state, q: "" }, name).map((line) => line.names[FILTERS[name]]))];
  if (name === "suite") values.push(...data.studies.map((study) => data.folders[study.folder].name));
  if (state[name] && !values.includes(state[name])) values.push(state[name]);
  const label = LABELS[name] ?? ((value) => value);
  const options = values.map((value) => element("option", { value }, label(value)));
  select.replaceChildren(element("option", { value: "" }, `All (${values.length})`), ...options);
  select.value = state[name] ?? "";
}

function draw(focus) {
  for (const name of Object.keys(FILTERS)) fillSelect(name);
  if (form.elements.q.value !== (state.q ?? "")) form.elements.q.value = state.q ?? "";
  drawTable(state, (column) => {
    toHash();
    draw(column);
  });
  if (focus !== undefined) byId("table").querySelector("th[aria-sort]:not([aria-sort=none]) button")?.focus();
  const shown = studies.map((study) => study.update(state));
  byId("studies").hidden = !shown.some(Boolean);
  for (const link of byId("views").querySelectorAll("a")) {
    const view = new URLSearchParams(link.hash.slice(1));
    const same = NAMES.every((name) => (view.get(name) ?? "") === (state[name] ?? ""));
    if (same) link.setAttribute("aria-current", "true");
    else link.removeAttribute("aria-current");
  }
}

function changed(name) {
  const value = form.elements[name].value;
  if (value) state[name] = value;
  else delete state[name];
  // A choice that leaves nothing lets go of the others, one after the other.
  for (const other of ["metric", "tokens", "model", "suite"]) {
    if (name !== "q" && other !== name && !passing({ ...state, q: "" }).length) delete state[other];
  }
  limit = PAGE;
  toHash();
  draw();
}

function setUpForm() {
  for (const name of Object.keys(FILTERS)) form.elements[name].addEventListener("change", () => changed(name));
  form.elements.q.addEventListener("input", () => changed("q"));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    state = {};
    order.column = null;
    limit = PAGE;
    known.forEach((method) => chosen.methods.add(method));
    changedMethods();
  });
  byId("more").addEventListener("click", () => {
    limit = Infinity;
    draw();
  });
  byId("skip").addEventListener("click", (event) => {
    event.preventDefault();
    byId("explore").focus();
  });
  byId("views").replaceChildren(
    ...data.views.map(({ title, hash }) => element("a", { href: `#${new URLSearchParams(hash)}` }, title)),
  );
  byId("study-list").replaceChildren(...studies.map((study) => study.details));
  makePick("table-tools", "Columns behind the numbers", TEXTS.slice(1).map(([name, label]) => [name, label]), asColumns, () => draw());
  downloads("table-tools", "numbers", () => shownTable(byId("table"), byId("table-caption").textContent));
  methodPick = makePick("method-pick", "Methods", known.filter((m) => m !== "dense").map((m) => [m, m, swatch(m, true)]), chosen.methods, changedMethods);
}

function setUpTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)");
  const kept = (value) => {
    try {
      if (value) localStorage.setItem("resting-theme", value);
      return localStorage.getItem("resting-theme");
    } catch {
      return null; // a file may have no storage
    }
  };
  const isDark = () => (document.documentElement.dataset.theme ?? (system.matches ? "dark" : "light")) === "dark";
  const show = () => (byId("theme").textContent = isDark() ? "Light" : "Dark");
  const before = kept();
  if (before === "dark" || before === "light") document.documentElement.dataset.theme = before;
  byId("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = kept(isDark() ? "light" : "dark") ?? (isDark() ? "light" : "dark");
    show();
  });
  system.addEventListener("change", show);
  show();
}

setUpTheme();
setUpBest();
setUpForm();
setUpTasks();
setUpMethods();
makeSortable(byId("suites"));
fromHash();
addEventListener("hashchange", fromHash);
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === drawnWidth) return;
  drawnWidth = innerWidth;
  if (data.boards.length) drawPictures();
  drawSpeeds();
});
document.documentElement.dataset.ready = "true";
