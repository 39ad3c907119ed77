"""Paired statistics of tasks, and their tables."""

from __future__ import annotations

import math
import re

import numpy as np
import pandas as pd
import pytest

from resting.benchmarks.quality.tasks import metrics
from resting.benchmarks.report import task_tables
from resting.benchmarks.report.table import Table


def test_perplexities_of_items():
    value, _ = metrics.summary("perplexity", [-1.0, -3.0])
    assert value == pytest.approx(math.exp(2.0))
    gap = metrics.paired("perplexity", [-2.0, -4.0, -6.0], [-1.0, -3.0, -5.0])
    assert gap.value == pytest.approx(1.0)
    assert metrics.summary("acc", [1.0, 0.0])[0] == 0.5


def frame_and_items():
    """Two tasks, one at chance; dense and a method that lost one item of four."""
    right = {"dense": [1, 1, 1, 0] * 25, "teal": [1, 1, 0, 0] * 25}
    rows, items = [], []
    for task, near in (("piqa", False), ("boolq", True)):
        for method, values in right.items():
            target = 0.0 if method == "dense" else 0.5
            shown = [1, 0] * 50 if near else values
            at = {"method": method, "target": target, "seed": 0, "metric": f"{task}/acc"}
            rows.append(at | {"dataset": task, "n": 100, "value": np.mean(shown), "byte_sparsity": target})
            items += [at | {"item": i, "value": float(v)} for i, v in enumerate(shown)]
    return pd.DataFrame(rows), pd.DataFrame(items)


def test_tables_mark_chance_and_noise(tmp_path):
    frame, items = frame_and_items()
    about = {t: {"headline": "acc", "chance": 0.5, "available": 1000} for t in ("piqa", "boolq")}
    cells = [{"method": "dense", "tasks": about}]
    parts = task_tables.sections(frame, items, cells, "x", tmp_path, "")
    text = "\n".join(part for part in parts if isinstance(part, str))
    assert "piqa 100 of 1000" in text
    assert "boolq (50 %)" in text
    table = next(part for part in parts if isinstance(part, Table))
    assert (table.title, table.caption) == ("Tasks", "At 0.50:")
    assert table.headers == ["", "mean", "of all", "piqa", "*boolq*"]
    assert table.rows[1] == ["teal", "50.0 (-25.0)", "50.0 (-12.5)", "50.0 (-25.0)", "50.0 (+0.0 ≈)"]
    assert (tmp_path / "tasks.png").stat().st_size > 1000
    assert (tmp_path / "tasks.svg").exists()


def test_token_policies_are_compared_with_the_same_dense_items():
    _, items = frame_and_items()
    cells = [{"method": "dense", "tasks": {"piqa": {"headline": "acc", "chance": 0.5, "available": 1000}}}]
    items = items[items.metric == "piqa/acc"].assign(tokens="all-but-first-1")
    better = items[items.method == "teal"].assign(tokens="last-0.5", value=[1.0, 1.0, 1.0, 0.0] * 25)
    both = ["all-but-first-1", "last-0.5"]
    _, table = task_tables.policies(pd.concat([items, better]), cells, both)  # dense under one only
    assert table.rows == [["teal", "0.50", "50.0 (-25.0)", "75.0 (+0.0 ≈)"]]
    assert task_tables.policies(items, cells, both) == []


def test_several_seeds_of_a_task_have_an_interval_over_seeds():
    """Each seed alone loses 9 or 17 points for certain; two that differ so much leave the loss of their mean open."""
    _, items = frame_and_items()
    items = items[items.metric == "piqa/acc"]
    about = {"piqa": {"headline": "acc", "chance": 0.5, "available": 1000}}
    dense = items[items.method == "dense"]
    seeds = [
        dense.assign(method="spon(teal)", target=0.5, seed=seed, value=dense.value * (dense.item >= lost))
        for seed, lost in ((0, 11), (1, 22))
    ]
    values = task_tables._by_method(pd.concat([dense, *seeds]), about)
    assert values["spon(teal)", 0.5]["piqa"].shape == (2, 100)
    lines = []
    for of in (seeds[:1], seeds):
        values = task_tables._by_method(pd.concat([dense, *of]), about)
        gaps = {"piqa": values["spon(teal)", 0.5]["piqa"] - values["dense", 0.0]["piqa"]}
        lines.append(task_tables._line("spon(teal)", values["spon(teal)", 0.5], gaps, about, ["piqa"])[1])
    assert lines == ["66.0 (-9.0)", "62.0 (-13.0 ≈)"]


def test_a_wrapper_is_held_against_what_it_wraps_on_the_same_items(tmp_path):
    """It has 20 of the 25 items back that TEAL lost at 0.50; of 0.60 there is no TEAL to hold it against."""
    frame, items = frame_and_items()
    about = {"piqa": {"headline": "acc", "chance": 0.5, "available": 1000}}
    teal = items[(items.method == "teal") & (items.metric == "piqa/acc")]
    lost = teal.item % 4 == 2
    better = teal.assign(method="spon(teal)", value=teal.value.where(~(lost & (teal.item < 80)), 1.0))
    items = pd.concat([items, better, better.assign(target=0.6)])
    parts = task_tables.sections(frame, items, [{"method": "dense", "tasks": about}], "x", tmp_path, "")
    tables = [part for part in parts if isinstance(part, Table) and part.caption.startswith("Points that a wrapper")]
    assert [(table.headers, len(table.rows)) for table in tables] == [(["", "0.50"], 1)]
    name, shown = tables[0].rows[0]
    value, low, high = (float(v) for v in re.findall(r"[+-][\d.]+", shown))
    # The standard error of a mean of 100 differences of which 20 are 1: four points.
    assert (name, value) == ("spon(teal)", 20.0)
    assert (low, high) == (pytest.approx(20.0 - 7.8, abs=1.5), pytest.approx(20.0 + 7.8, abs=1.5))
    assert "1 task above chance" in tables[0].caption
    assert "≈" not in shown
