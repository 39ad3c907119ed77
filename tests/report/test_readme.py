"""Reports of folders of every kind, and that what a run writes is what they read."""

from __future__ import annotations

import json
import re
import shutil

import pandas as pd
import pytest
from page_folder import RESULTS

from resting.benchmarks.cells.cell import COLUMNS
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report import readme

REPORTED = ["baselines", "baselines-wide", "tasks", "latency", "latency-7b-h200", "latency-8b-h200"]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The results, with reports."""
    root = shutil.copytree(RESULTS, tmp_path_factory.mktemp("reports") / "results")
    for name in REPORTED:
        readme.write(root / name)
    return root


@pytest.mark.parametrize("name", REPORTED)
def test_a_report_shows_what_it_names(written, name):
    text = (written / name / "README.md").read_text()
    title = json.loads((written / name / "provenance.json").read_text())["suite"]["title"]
    assert text.startswith(f"# {title}\n")
    for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", text):
        assert (written / name / picture).stat().st_size > 1000
    grids = len(re.findall(r"^\|-", text, flags=re.MULTILINE))
    assert len(list((written / name / "tables").glob("*.csv"))) == grids > 0


def test_numbers_of_a_report_are_those_of_its_rows(written):
    table = pd.read_csv(written / "baselines" / "tables" / "02-wikitext2.csv", index_col=0)
    rows = pd.read_csv(written / "baselines" / "results.csv")
    row = rows[(rows.method == "teal") & (rows.target == 0.5) & (rows.metric == "wikitext2_perplexity")]
    row = row[row.tokens == "all-but-first-1"].iloc[0]
    assert table.loc["teal", "0.50"] == f"{row.value:.2f} ± {row.stderr:.2f}"


@pytest.mark.parametrize("left_out", ["dense", "teal"])
def test_a_sweep_that_is_not_through_has_a_report(left_out, tmp_path):
    folder = shutil.copytree(RESULTS / "baselines", tmp_path / "baselines")
    rows = pd.read_csv(folder / "results.csv")
    rows[rows.method != left_out].to_csv(folder / "results.csv", index=False)
    facts = json.loads((folder / "provenance.json").read_text())
    facts["cells"] = [cell for cell in facts["cells"] if cell["method"] != left_out]
    facts["machines"] *= 2  # cells of one machine that differ in what is not said
    (folder / "provenance.json").write_text(json.dumps(facts))
    for old in folder.glob("*.png"):
        old.unlink()
    readme.write(folder)
    text = (folder / "README.md").read_text()
    assert (folder / "perplexity.png").exists() == ("](perplexity.png)" in text) == (left_out != "dense")
    (measured,) = re.findall(r"^Measured in .*", text, flags=re.MULTILINE)
    assert measured.count("cores") == 1


def test_times_are_drawn_against_the_quality_beside_them(written):
    assert "from the suite `baselines`" in (written / "latency" / "README.md").read_text()


@pytest.mark.parametrize("folder", sorted(f.parent for f in RESULTS.rglob("provenance.json")), ids=lambda f: f.name)
def test_the_suite_of_a_folder_is_read_again(folder):
    suite = Suite.model_validate(folders.read_facts(folder)["suite"])
    assert folder.name.startswith(suite.name)


def test_a_run_writes_the_columns_that_are_read():
    assert set(folders.NEEDED["results.csv"]) <= set(COLUMNS)
    assert set(folders.SINGLE) <= set(COLUMNS)


def test_a_study_is_told_from_a_suite(tmp_path):
    folder = shutil.copytree(RESULTS / "method" / "spon-prune-pruning", tmp_path / "spon-prune-pruning")
    with pytest.raises(BenchmarkError, match="holds a study"):
        readme.write(folder)
