"""Numbers that are not finite are no numbers: neither of a text nor of a task."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
from families import build

from resting.benchmarks import cache
from resting.benchmarks.cells.cell import Result
from resting.benchmarks.quality.perplexity import Score, exp
from resting.benchmarks.quality.rows import Rows
from resting.benchmarks.quality.tasks import metrics
from resting.benchmarks.quality.tasks.evaluator import TaskEvaluator
from resting.benchmarks.sweep.run_cells import attempt
from resting.sparsifier import AllButFirst, DivergedError, Plan, fingerprint


@pytest.mark.parametrize("nats", [0.0, 3.25, 700.0, 709.7, -800.0])
def test_an_exponential_is_that_of_math(nats):
    assert exp(nats) == math.exp(nats)


def test_an_exponential_that_overflows_is_infinite():
    assert exp(710.0) == math.inf
    with pytest.raises(OverflowError):
        math.exp(710.0)


def test_a_task_s_perplexity_is_not_cut():
    assert metrics.summary("perplexity", [-701.0, -701.0])[0] == math.exp(701.0)
    assert metrics.summary("perplexity", [-9000.0, -9000.0])[0] == math.inf


def test_a_likelihood_of_nan_is_no_answer():
    """An argmax takes the first of NaNs, which is right for a share of the items."""
    model = build("llama")
    evaluator = TaskEvaluator(model, None, SimpleNamespace(), {}, lambda *_: None)
    evaluator.__dict__["lm"] = SimpleNamespace(
        scorer=SimpleNamespace(), loglikelihood=lambda *_, **__: [(-1.0, False), (math.nan, False)]
    )
    task = SimpleNamespace(name="copa", instances=[])
    with pytest.raises(DivergedError, match="log-likelihoods of copa are not finite"):
        evaluator.answers(task, Plan({}, "dense", 0.0, 0.0, fingerprint.of_model(model)), AllButFirst(1))


def test_what_is_finite_of_a_cell_is_kept():
    suite = SimpleNamespace(name="s", dtype="float32", evaluation=SimpleNamespace(window=16), task_names=[])
    cell = SimpleNamespace(label="teal", target=0.5, seed=0, policy=AllButFirst(1))
    rows = Rows(suite, "m", cell)
    rows.score("news", Score(np.array([1e6, 2e6]), np.array([1.0, 3.0]), 1, 0.5))
    found = attempt(lambda _: Result("done", rows.rows, rows.windows), None)
    assert found.status == "diverged"
    by_metric = {row["metric"]: row for row in found.rows}
    assert by_metric["news_perplexity"]["value"] is None
    assert by_metric["news_perplexity"]["stderr"] is None
    assert by_metric["news_perplexity"]["reason"] == "diverged: the value is inf"
    assert by_metric["news_kl"]["value"] == 2.0
    assert found.windows["news_nll"] == [1e6, 2e6]


def test_a_reason_is_the_same_wherever_the_cache_lies(tmp_path, monkeypatch):
    evaluation = SimpleNamespace(window=16, texts=["news"])
    suite = SimpleNamespace(name="s", dtype="float32", evaluation=evaluation, task_names=["copa"])
    cell = SimpleNamespace(label="teal", target=0.5, seed=0, policy=AllButFirst(1))
    found = []
    for name in ("here", "there"):
        monkeypatch.setenv("RESTING_CACHE", str(tmp_path / name))
        rows = Rows(suite, "m", cell)
        rows.nothing(f"not what its hash says in the cache ({cache.root() / 'texts' / 'news.txt'})")
        found.append(rows.rows)
    assert found[0] == found[1]
    assert {r["reason"] for r in found[0]} == {"not what its hash says in the cache ($RESTING_CACHE/texts/news.txt)"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", ".")
    rows = Rows(suite, "m", cell)
    rows.nothing(f"0.5 of 1.5 GB in the cache ({cache.root() / 'a.txt'}), not {tmp_path}-2/a.txt")
    assert {r["reason"] for r in rows.rows} == {
        f"0.5 of 1.5 GB in the cache ($RESTING_CACHE/a.txt), not {tmp_path}-2/a.txt"
    }


def test_json_has_no_word_for_what_is_not_finite():
    content = {"a": [1.0, math.nan, {"b": (math.inf, -math.inf, np.float64("nan"))}], "c": "NaN"}
    assert json.loads(cache.as_json(content)) == {"a": [1.0, None, {"b": [None, None, None]}], "c": "NaN"}
