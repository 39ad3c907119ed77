"""Tables of a report as LaTeX and CSV."""

from __future__ import annotations

import csv
import shutil
import subprocess

import pytest

from resting.benchmarks.report import export
from resting.benchmarks.report.tables import markdown

PARTS = [
    "# A suite",
    "Nats & percent: **Bold** is `best`.\nMore.",
    markdown([["teal_x", "**0.40** ≈", "5 % ± 1"], ["spon(teal)", "", "{a}^~\\"]], ["", "0.25", "0.50"]),
    "",
    "![picture](x.png)",
    "## Second",
    markdown([["a", "1"]], ["method", "n"]),
]


def test_tables_are_found_with_their_headings():
    first, second = export.tables(PARTS)
    assert (first.title, first.caption) == ("A suite", "Nats & percent: Bold is best.")
    assert first.headers == ["", "0.25", "0.50"]
    assert first.rows[1] == ["spon(teal)", "", "{a}^~\\"]
    assert (second.title, second.caption, second.rows) == ("Second", "", [["a", "1"]])


def test_latex_is_escaped_and_bold():
    text = export.tables(PARTS)[0].latex()
    assert r"teal\_x & \textbf{0.40} $\approx$ & 5 \% $\pm$ 1 \\" in text
    assert r"spon(teal) &  & \{a\}\textasciicircum{}\textasciitilde{}\textbackslash{} \\" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert r"\caption{A suite. Nats \& percent: Bold is best.}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(tmp_path):
    body = "".join(table.latex() for table in export.tables(PARTS))
    head = r"\documentclass{article}\usepackage{booktabs,textcomp}\begin{document}"
    (tmp_path / "x.tex").write_text(f"{head}{body}\\end{{document}}")
    subprocess.run(["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "x.tex"], cwd=tmp_path, check=True)


def test_files_replace_what_was_there(tmp_path):
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "09-old.csv").write_text("x")
    export.write(tmp_path, PARTS)
    names = sorted(file.name for file in (tmp_path / "tables").iterdir())
    assert names == ["01-a-suite.csv", "01-a-suite.tex", "02-second.csv", "02-second.tex"]
    rows = list(csv.reader((tmp_path / "tables" / "01-a-suite.csv").read_text().splitlines()))
    assert rows[1] == ["teal_x", "0.40 ≈", "5 % ± 1"]
