"""The ranking of a suite: ranks, paired differences and reasons, against sums by hand."""

from __future__ import annotations

import json
import re

import numpy as np
import pandas as pd
import pytest
from results_folder import DENSE, folder_with, row

from resting.benchmarks.report import sections
from resting.benchmarks.report.compared import ranking

NOISE = np.tile([0.05, -0.05], 6)
"""Of mean zero, as large as half a difference: not told from it in twelve windows, where it is paired with nothing."""
LOSSES = {
    "teal": np.full(12, 0.30),
    "spon(teal)": np.full(12, 0.10),
    "near": np.full(12, 0.101) + NOISE,
    "far": np.full(12, 0.90),
}


def singles(losses=LOSSES, tokens="all-but-first-1"):
    values = {("dense", 0.0): DENSE} | {(method, 0.5): DENSE + lost for method, lost in losses.items()}
    return pd.DataFrame(
        [
            {"model": "tiny", "method": m, "target": t, "seed": 0, "tokens": tokens, "metric": "news_nll"}
            | {"window": i, "value": value}
            for (m, t), of in values.items()
            for i, value in enumerate(of)
        ]
    )


def rows(losses=LOSSES):
    found = [row("dense", 10.0, 0.0, 0.0)] + [row(method, 11.0, 0.501) for method in losses]
    return [one for one in found if one["method"] != "far"] + [row("far", 20.0, 0.40)]


def test_ranks_and_paired_differences():
    frame = pd.DataFrame(rows())
    found = ranking.ranked(frame, singles(), ["news"], 0.5, "teal", {("far", 0.5): "measured 0.40"})
    assert [(line.method, line.rank) for line in found] == [
        ("spon(teal)", 1),
        ("near", 2),
        ("teal", 3),
        ("far", None),
    ]
    first, near, teal, far = found
    assert first.loss.value == pytest.approx(0.10)
    assert first.from_best is None
    assert first.apart is None
    assert first.from_reference.value == pytest.approx(-0.20)
    assert first.from_reference.high < 0
    assert near.from_best.value == pytest.approx(0.001)
    assert near.from_best.holds_zero
    assert near.apart is False
    assert teal.apart is True
    assert teal.from_reference is None
    assert teal.from_best.value == pytest.approx(0.20)
    assert far.unranked == "measured 0.40"
    assert far.bytes == pytest.approx(0.40)
    assert teal.bytes == pytest.approx(0.501)


def test_a_report_has_the_ranking_and_the_reasons(tmp_path):
    every = [*rows(), row("cats", np.nan, np.nan) | {"reason": "its sites hold half of the bytes"}]
    folder = folder_with(tmp_path / "mine", every, singles())
    facts = json.loads((folder / "provenance.json").read_text())
    facts["suite"] |= {"ranking": True, "reference": "teal"}
    (folder / "provenance.json").write_text(json.dumps(facts))
    sections.write(folder)
    text = (folder / "README.md").read_text()
    assert "### Ranking at 0.50" in text
    table = text.split("### Ranking at 0.50")[1]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.split("\n") if line.startswith("|")]
    assert lines[0][:5] == ["rank", "method", "bytes at rest", "news", "mean"]
    assert lines[2][:2] == ["1", "**spon(teal)**"]
    assert lines[2][-1] == ""
    assert lines[3][-1] == "no"
    assert lines[4][-1] == "yes"
    assert re.match(r"\+0\.001 \[-0\.\d+, \+0\.\d+\]", lines[3][5])
    assert lines[5][0] == "- (measured 0.40)"
    assert "Without a number at 0.50:\n\n- cats: its sites hold half of the bytes" in text
    assert list((folder / "tables").glob("*ranking-at-0-50.csv"))


def test_no_ranking_where_none_is_asked_for(tmp_path):
    folder = folder_with(tmp_path / "mine", rows(), singles())
    sections.write(folder)
    assert "Ranking" not in (folder / "README.md").read_text()


def test_a_method_that_lacks_a_text_has_no_rank():
    lacking = singles({"teal": LOSSES["teal"], "near": np.full(12, np.nan)})
    found = ranking.ranked(pd.DataFrame(rows()), lacking, ["news"], 0.5, None, {})
    assert [line.method for line in found] == ["teal"]
    assert found[0].from_best is None
    assert found[0].from_reference is None
