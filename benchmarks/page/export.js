// Tables as files, and lists of choices that open and close.

const ESCAPES = {
  "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "≈": "$\\approx$", "≤": "$\\leq$", "≥": "$\\geq$",
  "×": "$\\times$", "−": "$-$", "∞": "$\\infty$", "–": "--", "↓": "$\\downarrow$", "↑": "$\\uparrow$", "†": "$\\dagger$",
};
const forLatex = (text) => text.replace(/[\\&%$#_{}~^≈≤≥×−∞–↓↑†]/g, (sign) => ESCAPES[sign] ?? `\\${sign}`);
const forCsv = (text) => (/[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text);

// `table` is { caption, head: [text], lines: [[text]] }.
function asCsv({ head, lines }) {
  return [head, ...lines].map((line) => line.map((cell) => forCsv(cell.replaceAll("−", "-"))).join(",")).join("\n") + "\n";
}

function asLatex({ caption, head, lines }) {
  const row = (line) => `${line.map(forLatex).join(" & ")} \\\\`;
  return [
    "\\begin{table}", "\\centering", `\\caption{${forLatex(caption)}}`, `\\begin{tabular}{l${"r".repeat(head.length - 1)}}`,
    "\\toprule", row(head), "\\midrule", ...lines.map(row), "\\bottomrule", "\\end{tabular}", "\\end{table}", "",
  ].join("\n");
}

function save(name, text, kind) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type: kind })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// Two buttons that write what `shown` returns at that moment.
function downloads(host, name, shown) {
  const csv = element("button", { type: "button", class: "quiet small" }, "CSV");
  const latex = element("button", { type: "button", class: "quiet small" }, "LaTeX");
  csv.setAttribute("aria-label", `Download ${name} as CSV`);
  latex.setAttribute("aria-label", `Download ${name} as LaTeX`);
  csv.addEventListener("click", () => save(`${name}.csv`, asCsv(shown()), "text/csv"));
  latex.addEventListener("click", () => save(`${name}.tex`, asLatex(shown()), "text/x-tex"));
  byId(host).append(csv, latex);
}

const textOf = (cell) => (cell.dataset.text ?? cell.innerText ?? cell.textContent).replace(/\s+/g, " ").trim();

// What a table in the page shows now.
function shownTable(table, caption) {
  const head = [...table.tHead.rows].at(-1);
  return {
    caption,
    head: [...head.cells].map((cell) => cell.dataset.label ?? textOf(cell)),
    lines: [...table.tBodies[0].rows].map((row) => [...row.cells].map(textOf)),
  };
}

// A list of boxes to tick. `options` are [value, label, icon]; `on` is a Set that is changed in place.
function makePick(host, title, options, on, changed) {
  const names = () => options.map(([value]) => value).filter((value) => on.has(value));
  const summary = element("summary", { class: "quiet small" });
  const said = () => {
    const count = names().length;
    summary.textContent = `${title}: ${count === options.length ? "all" : `${count} of ${options.length}`}`;
  };
  const boxes = options.map(([value, label, icon]) => {
    const box = element("input", { type: "checkbox" });
    box.checked = on.has(value);
    box.addEventListener("change", () => {
      if (box.checked) on.add(value);
      else on.delete(value);
      said();
      changed();
    });
    return [value, box, element("label", { class: "tick-box" }, box, ...(icon ? [icon] : []), element("span", {}, label))];
  });
  const set = (wanted) => {
    for (const [value, box] of boxes) {
      box.checked = wanted;
      if (wanted) on.add(value);
      else on.delete(value);
    }
    said();
    changed();
  };
  const all = element("button", { type: "button", class: "link" }, "all");
  const none = element("button", { type: "button", class: "link" }, "none");
  all.addEventListener("click", () => set(true));
  none.addEventListener("click", () => set(false));
  const list = element("div", { class: "pick-list", role: "group", "aria-label": title }, ...boxes.map(([, , label]) => label));
  const details = element("details", { class: "pick" }, summary, element("div", { class: "pick-body" }, element("p", {}, all, " · ", none), list));
  details.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    details.open = false;
    summary.focus();
  });
  document.addEventListener("click", (event) => {
    if (!details.contains(event.target)) details.open = false;
  });
  said();
  byId(host).append(details);
  return {
    update() {
      for (const [value, box] of boxes) box.checked = on.has(value);
      said();
    },
  };
}
