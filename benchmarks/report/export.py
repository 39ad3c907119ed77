"""The tables of a report as LaTeX (booktabs) and CSV, for papers and spreadsheets."""

from __future__ import annotations

import csv
import io
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from resting.benchmarks import cache

ESCAPES = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "≈": r"$\approx$",
    "±": r"$\pm$",
    "µ": r"\textmu{}",
}


@dataclass(frozen=True)
class Table:
    """One table of a report.

    Attributes
    ----------
    title : str
        The heading above it.
    caption : str
        The paragraph above it.
    headers : list of str
    rows : list of list of str
        Cells as in the report: Markdown's bold is in them.
    """

    title: str
    caption: str
    headers: list[str]
    rows: list[list[str]]

    def latex(self) -> str:
        """A ``table`` environment with rules of the package booktabs."""
        columns = "l" + "r" * (len(self.headers) - 1)
        lines = [" & ".join(map(_latex, row)) + r" \\" for row in (self.headers, *self.rows)]
        body = [r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule"]
        inside = "\n".join(body)
        caption = _latex(f"{self.title}. {self.caption}".strip())
        return (
            f"\\begin{{table}}\n\\centering\n\\caption{{{caption}}}\n\\begin{{tabular}}{{{columns}}}\n{inside}\n"
            "\\end{tabular}\n\\end{table}\n"
        )

    def csv(self) -> str:
        """Cells without markup."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([[_plain(cell) for cell in row] for row in (self.headers, *self.rows)])
        return text.getvalue()


def tables(parts: list[str]) -> list[Table]:
    """The tables among the paragraphs of a report."""
    title = caption = ""
    found = []
    for part in parts:
        if part.startswith("#"):
            title, caption = part.splitlines()[0].lstrip("# "), ""
        elif part.startswith("|"):
            headers, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines())
            found.append(Table(title, caption, headers, rows))
            caption = ""
        elif part.strip() and not part.startswith("!["):
            caption = _plain(part.splitlines()[0])
    return found


def write(folder: Path, parts: list[str]) -> None:
    """Write every table among `parts` into ``folder/tables``, which holds nothing else."""
    inner = folder / "tables"
    shutil.rmtree(inner, ignore_errors=True)
    for number, table in enumerate(tables(parts), 1):
        slug = re.sub(r"[^a-z0-9]+", "-", table.title.lower())[:48].strip("-")
        cache.write_whole(inner / f"{number:02}-{slug}.tex", table.latex())
        cache.write_whole(inner / f"{number:02}-{slug}.csv", table.csv())


def _latex(text: str) -> str:
    bold = re.split(r"\*\*(.+?)\*\*", text)
    escaped = ["".join(ESCAPES.get(sign, sign) for sign in part.replace("`", "")) for part in bold]
    return "".join(rf"\textbf{{{part}}}" if i % 2 else part for i, part in enumerate(escaped))


def _plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")
