// Filters, the address of a view, the theme, and the start.

const NAMES = [...Object.keys(FILTERS), "q"];
const form = byId("filters");
let state = {};

// An address says everything: what it does not name is not filtered. Without one, the first view is shown.
function fromHash() {
  const hash = location.hash.slice(1);
  if (hash === "explore") return;
  const given = new URLSearchParams(hash);
  const view = hash ? Object.fromEntries(given) : (data.views[0]?.hash ?? {});
  state = Object.fromEntries(NAMES.filter((name) => view[name]).map((name) => [name, view[name]]));
  limit = PAGE;
  const column = given.get("sort");
  order.column = column === null ? null : TEXTS.some(([name]) => name === column) ? column : Number(column);
  order.down = given.get("order") === "down";
  if (given.get("picture") && given.get("picture") !== panel?.id) choosePanel(given.get("picture"));
  draw();
}

function toHash() {
  const out = new URLSearchParams(NAMES.filter((name) => state[name]).map((name) => [name, state[name]]));
  if (order.column !== null) out.set("sort", order.column);
  if (order.column !== null && order.down) out.set("order", "down");
  if (panel && panel !== data.panels[0]) out.set("picture", panel.id);
  history.replaceState(null, "", `#${out.toString() || "all"}`);
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
  for (const other of ["metric", "tokens", "method", "model", "suite"]) {
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
    toHash();
    draw();
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
  byId("panel").addEventListener("change", () => {
    choosePanel(byId("panel").value);
    toHash();
  });
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
setUpPicture();
setUpForm();
makeSortable(byId("suites"));
choosePanel(data.panels[0]?.id);
fromHash();
addEventListener("hashchange", fromHash);
document.documentElement.dataset.ready = "true";
