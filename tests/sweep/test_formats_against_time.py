"""Losses of weight formats against measured time: which are joined, what is said, and what stays apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import tiny

from resting.benchmarks import run
from resting.benchmarks.cells import suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.progress import Console
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report import latency_tables, sections
from resting.benchmarks.report.compared import formats_against_time as against
from resting.benchmarks.report.compared.weights import Compared
from resting.benchmarks.report.plots.bits import Point

FORMATS = ["as-is", "int8-g16", "int8-g16-gptq"]
TIMES = """
name = "times"
title = "Times"
targets = [0.3, 0.5]
weights = ["as-is", "int8-g16"]
[calibration]
window = 16
statistics_windows = 4
matching_window = 16
matching_windows = 2
[evaluation]
texts = []
[latency]
prompt = 8
decoded_tokens = 8
quality = "mine"
generate = false
[latency.cpu]
models = ["a/model"]
[[methods]]
name = "dense"
[[methods]]
name = "teal"
"""


def test_losses_of_a_suite_get_the_times_of_another(here):
    """A real run of both, of which the report of either has the section."""
    (here / "mine.toml").write_text(
        tiny.SUITE.replace("targets = [0.5]", f'model = "a/model"\ntargets = [0.5]\nweights = {FORMATS}')
    )
    (here / "times.toml").write_text(TIMES)
    good = run.run(suite_file.load("mine.toml"), Options(here / "out"), Console(quiet=True))
    assert "against time" not in (good / "README.md").read_text()
    fast = run.run(suite_file.load("times.toml"), Options(here / "out"), Console(quiet=True))
    text = (fast / "README.md").read_text()
    assert "## Loss against time, model, float32, 1 CPU thread" in text or "2 CPU threads" in text
    assert "losses are those of the suite `mine`" in text
    assert "`-gptq` has the time of the nearest codes" in text
    assert "random" not in text
    assert (fast / "time.png").is_file()
    assert not (fast / "quality-against-time.png").exists()
    (front,) = [pd.read_csv(file) for file in (fast / "tables").glob("*.csv") if "ms,weights" in file.read_text()]
    assert set(front.weights) <= set(FORMATS)
    sections.write(good)
    said = (good / "README.md").read_text()
    assert "times are those of `times`" in said
    assert (good / "times-time.png").is_file()
    decoded = pd.read_csv(fast / "decode.csv")
    (one,) = against.timed(decoded)
    (of,) = against._losses(good)
    points, of_codes = against.joined(of, one)
    assert of_codes
    assert {(p.format, p.method, p.target) for p in points} == {
        (form, method, target) for form in FORMATS for method, target in (("dense", 0.0), ("teal", 0.5))
    }
    for point in points:
        (same,) = [p for p in of.points if (p.format, p.method, p.target) == (point.format, point.method, point.target)]
        assert replace(point, cost=same.cost) == same
    cost = {(p.format, p.method): p.cost for p in points}
    assert cost["int8-g16-gptq", "teal"] == cost["int8-g16", "teal"]
    row = decoded[(decoded.weight_format == "int8-g16") & (decoded.target == 0.5)].iloc[0]
    dense = decoded.dense_p20.median()
    assert cost["int8-g16", "teal"] == pytest.approx(1e3 * dense * row.sparse_p20 / row.dense_p20, rel=1e-6)
    assert cost["as-is", "dense"] == pytest.approx(1e3 * dense, rel=1e-6)
    latency_tables.write(fast)
    assert (fast / "README.md").read_text() == text
    facts = folders.read_facts(fast)
    other = decoded.assign(weights="0" * 12)  # other weights of the same name
    assert against.of_times(other, facts, fast) == []
    drawn = decoded.assign(weights="random", model="a shape (random weights)")
    drawn["model"] = drawn.model.where(drawn.weight_format.isna(), "a shape (random weights, then int8-g16)")
    about = against.of_times(drawn, facts, fast)[1]
    assert "Weights of a shape (random weights) are random, and have a time and no quality" in about
    assert "those of model in the same format" in about


def row(form, target, sparse, dense, own=np.nan, every=np.nan, weights="0" * 12):
    named = "tiny" if form is None else f"tiny ({form})"
    about = {"model": named, "weights": weights, "dtype": "float32", "threads": 1, "method": "teal", "target": target}
    times = {"sparse_p20": sparse, "dense_p20": dense, "speedup": dense / sparse, "weight_format": form}
    return about | times | {"own_dense_p20": own, "speedup_all": every}


def test_a_time_is_a_share_of_the_dense_path_in_turn():
    """A part of a run on a machine that was twice as slow gives the same times."""
    rows = [row(None, 0.5, 1.0, 2.0), row("int8", 0.5, 0.8, 4.0, own=2.0), row("int8", 0.3, 0.5, 2.0, own=1.0)]
    (one,) = against.timed(pd.DataFrame(rows))
    assert (one.model, one.dense) == ("tiny", 2000.0)
    assert one.times == pytest.approx(
        {
            ("as-is", "dense", 0.0): 2000.0,
            ("as-is", "teal", 0.5): 1000.0,
            ("int8", "dense", 0.0): 1000.0,
            ("int8", "teal", 0.5): 400.0,
            ("int8", "teal", 0.3): 500.0,
        }
    )


@pytest.mark.parametrize(("every", "own"), [(1.5, 1.5 * 0.8), (5.0, None)])
def test_rows_of_before_tell_codes_with_nothing_at_rest_where_they_were_faster(every, own):
    rows = [row(None, 0.5, 1.0, 4.0), row("int8", 0.5, 0.8, 4.0, every=every)]
    (one,) = against.timed(pd.DataFrame(rows))
    assert one.times.get(("int8", "dense", 0.0)) == (None if own is None else pytest.approx(1e3 * own))


def test_formats_are_of_the_same_weights():
    points = [Point(form, "teal", 0.5, 4.0, 0.1, 0.0, 0.2) for form in ("as-is", "int8", "int8-gptq", "int4-g32")]
    of = Compared(
        "tiny", {"as-is": "0" * 64, "int8": "1" * 64, "int8-gptq": "2" * 64, "int4-g32": "3" * 64}, points, {}
    )
    rows = [row(None, 0.5, 1.0, 2.0), row("int8", 0.5, 0.5, 2.0, weights="1" * 12)]
    rows += [row("int4-g32", 0.5, 0.4, 2.0, weights="9" * 12)]
    (one,) = against.timed(pd.DataFrame(rows))
    found, of_codes = against.joined(of, one)
    assert [(p.format, p.cost) for p in found] == [("as-is", 1000.0), ("int8", 500.0), ("int8-gptq", 500.0)]
    assert of_codes
