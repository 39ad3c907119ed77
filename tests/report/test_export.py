"""Tables of a report as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import shutil
import subprocess

import pytest

from resting.benchmarks.report import export
from resting.benchmarks.report.table import Table

FIRST = Table(
    "A suite",
    "Nats & percent: **Bold** is `best`.",
    ["", "0.25", "0.25"],
    [["teal_x", "**0.40** ≈", "5 % ± 1"], ["spon(teal)", "", "{a}^~\\"]],
)
SECOND = Table("Second", "", ["method", "n"], [["a|b", "1"]])
PARTS = ["# A suite", FIRST, "![picture](x.png)", "## Second", SECOND]


def test_markdown_has_the_caption_above_the_table():
    caption, head, line, *rows = [line for line in FIRST.markdown().splitlines() if line]
    assert caption == "Nats & percent: **Bold** is `best`."
    assert [cell.strip() for cell in head.split("|")] == ["", "", "0.25", "0.25", ""]
    assert set(line) <= set("-|")
    assert "**0.40** ≈" in rows[0]
    assert SECOND.markdown().startswith("| method")


def test_a_bar_in_a_cell_ends_no_cell_of_markdown():
    assert r"| a\|b" in SECOND.markdown()
    assert "a|b,1" in SECOND.csv()


def test_latex_is_escaped_and_bold():
    text = FIRST.latex()
    assert r"teal\_x & \textbf{0.40} $\approx$ & 5 \% $\pm$ 1 \\" in text
    assert r"spon(teal) &  & \{a\}\textasciicircum{}\textasciitilde{}\textbackslash{} \\" in text
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert r"\caption{A suite. Nats \& percent: Bold is best.}" in text
    assert r"\begin{tabular}{lrr}" in text


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex")
def test_latex_compiles(tmp_path):
    body = FIRST.latex() + SECOND.latex()
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
    text = (tmp_path / "README.md").read_text()
    assert text == f"# A suite\n\n{FIRST.markdown()}\n\n![picture](x.png)\n\n## Second\n\n{SECOND.markdown()}\n"
