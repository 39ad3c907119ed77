"""What a person wrote about a run stands at the end of its README."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from page_folder import RESULTS

from resting.benchmarks.report import latency_tables, notes, sections


def test_without_a_file_there_is_no_section(tmp_path):
    assert notes.section(tmp_path) == []


def test_the_section_is_the_file(tmp_path):
    (tmp_path / "NOTES.md").write_text("- One run.\n")
    assert notes.section(tmp_path) == ["## Notes\n\n- One run."]


@pytest.mark.parametrize(
    ("name", "write"),
    [("latency-8b-h200", latency_tables.write), ("baselines", sections.write)],
    ids=["times", "quality"],
)
def test_both_kinds_of_reports_end_with_it(tmp_path, name, write):
    folder = shutil.copytree(RESULTS / name, tmp_path / Path(name).name)
    (folder / "NOTES.md").write_text("- It ran from a copied checkout.\n")
    write(folder)
    assert (folder / "README.md").read_text().endswith("\n\n## Notes\n\n- It ran from a copied checkout.\n")
