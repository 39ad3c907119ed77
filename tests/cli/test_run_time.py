"""The times that a dry run shows: near what committed runs took, and unknown where nothing was measured."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import tiny
from typer.testing import CliRunner

from resting.baselines.teal import Teal
from resting.benchmarks.cells import expand, own_texts, run_time, suite_file
from resting.benchmarks.cli import dry_run, main
from resting.benchmarks.latency.random_models import shapes

RESULTS = Path(__file__).parents[1] / "data" / "results"
SMALL = 134.5e6
GPU, CPU = run_time.machines()


@pytest.mark.parametrize(
    ("folder", "machine", "method"),
    [
        ("baselines", CPU, "teal"),
        ("baselines", CPU, "mean-error(teal)"),
        ("baselines-wide", GPU, "teal"),
        ("baselines-wide", GPU, "spon(teal)"),
        ("tasks", GPU, "teal"),
    ],
)
def test_estimates_are_near_what_runs_took(folder, machine, method):
    suite = suite_file.load(folder)
    took = [
        cell["seconds"]
        for cell in json.loads((RESULTS / folder / "provenance.json").read_text())["cells"]
        if cell["method"] == method and cell["target"] == 0.5 and cell["tokens"] == "all-but-first-1"
    ]
    cells = [cell for cell in expand.cells_of(suite) if cell.label == method and cell.target == 0.5]
    estimate = run_time.seconds(suite, cells[0], SMALL, machine)
    assert min(took) / 3 < estimate < 3 * max(took)


def test_rates_are_interpolated_and_end():
    assert GPU.tokens_per_second(SMALL) == 75000
    assert 46000 < GPU.tokens_per_second(1e9) < 75000
    assert 9400 < GPU.tokens_per_second(4e9) < 46000
    assert GPU.tokens_per_second(2 * 8.03e9) == pytest.approx(4700)
    assert GPU.tokens_per_second(70e9) is None
    assert CPU.tokens_per_second(8e9) is None
    suite = suite_file.load("baselines")
    cell = expand.cells_of(suite)[0]
    assert run_time.seconds(suite, cell, None, GPU) is None
    assert run_time.seconds(suite.model_copy(update={"dtype": "float32"}), cell, SMALL, GPU) is None


def test_more_training_and_more_text_take_longer():
    suite = suite_file.load("spon-final")
    teal, spon, refined = (
        next(c for c in expand.cells_of(suite) if c.label == label)
        for label in ("teal", "spon(teal)", "spon-refined(teal)")
    )
    assert run_time.forwards(suite, teal) < run_time.forwards(suite, spon) < run_time.forwards(suite, refined)
    # 60 steps of 8 x 512 tokens, four forwards each; 48 windows of 256 of two texts, six times while training.
    assert run_time.forwards(suite, spon) - run_time.forwards(suite, teal) == 4 * 60 * 8 * 512 + 6 * 48 * 256 * 2
    more = suite.evaluation.model_copy(update={"windows": 128})
    assert run_time.evaluated_tokens(suite.model_copy(update={"evaluation": more})) == 2 * 64 * 512 * 3
    whole = suite.evaluation.model_copy(update={"windows": None, "texts": ["wikitext2"]})
    assert run_time.evaluated_tokens(suite.model_copy(update={"evaluation": whole})) == 585 * 512


def test_a_training_is_counted_once_for_all_token_policies():
    suite = suite_file.load("baselines-wide")
    steps = 4 * 200 * 16 * 128
    trained = {
        (cell.label, cell.target): [] for cell in expand.cells_of(suite) if cell.label in ("spon(teal)", "spon(cats)")
    }
    for cell in expand.cells_of(suite):
        if (cell.label, cell.target) in trained:
            trained[cell.label, cell.target].append(run_time.forwards(suite, cell) > steps)
    assert len(trained["spon(teal)", 0.5]) == 3  # under the suite's own policy and two others
    assert len(trained["spon(cats)", 0.5]) == 2  # under the others alone
    assert all(found == [True] + [False] * (len(found) - 1) for found in trained.values())


def test_a_method_of_ones_own_may_call_its_parameters_as_it_likes():
    @dataclass
    class Mine(Teal):
        name: ClassVar[str] = "mine"
        steps: int = 3
        batch: str = "all"

    suite = suite_file.load("baselines-wide")
    cells = expand.cells_of(suite, (Mine,))
    mine, teal = ([run_time.forwards(suite, c) for c in cells if c.label == label] for label in ("mine", "teal"))
    assert mine[0] == teal[0]


def test_a_greedy_search_counts_where_jobs_are_put_in_order():
    suite = suite_file.load("scale")
    found = {}
    for cell in expand.cells_of(suite):
        if cell.target == 0.5:
            found[cell.label] = run_time.searched(cell.sparsifier)
    assert found["teal"] == found["was"] == found["spon(teal)"] == 0
    assert found["teal-greedy"] == pytest.approx(
        run_time.SEARCHED * 7 * 50 * 4 * 512
    )  # seven projections, steps of 0.01


def test_a_dry_run_takes_texts_of_the_users_own(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.provide_texts(monkeypatch)
    tiny.model_folder(tmp_path / "model")
    for name, length in (("mine", 400), ("long", 4000)):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{name} {i} " + "w" * length for i in range(20)))
    text = tiny.SUITE.replace('["wikipedia"]', '["mine.txt", "long.txt"]').replace("windows = 3\n", "")
    text = text.replace('name = "mine"', 'name = "mine"\nmodel = "model"')
    (tmp_path / "suite.toml").write_text(text)
    (tmp_path / "hub.toml").write_text(text.replace('"long.txt"', '"hub:someone/else:text"'))
    for suite in ("suite.toml", "hub.toml"):
        done = CliRunner().invoke(main.app, ["run", suite, "--dry-run"], catch_exceptions=False)
        assert done.exit_code == 0
        assert "time on" in done.output
    found = own_texts.resolved(suite_file.load("suite.toml"))
    assert run_time.evaluated_tokens(found) == pytest.approx(20 * (400 + 4000) / 4, rel=0.1)


def test_a_dry_run_says_times_for_every_model(monkeypatch, tmp_path):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path))
    done = CliRunner().invoke(main.app, ["run", "original", "--dry-run"])
    assert done.exit_code == 0
    times = re.findall(r"time on H100 80 GB, bfloat16: about ([\d.]+ (?:min|h))", done.output)
    assert len(times) == 3
    assert done.output.count("time on 2 cores (AMD EPYC), bfloat16: unknown") == 3
    assert re.search(r"spon|teal-greedy, original +0\.50 .*, \d+ (s|min) on H100 80 GB", done.output)


def test_weights_of_published_shapes():
    # From the models' cards: 8.03e9, 70.6e9, 7.24e9 and 8.19e9.
    for name, count in (("llama-3-8b", 8.03e9), ("llama-3-70b", 70.55e9), ("mistral-7b", 7.24e9), ("qwen3-8b", 8.19e9)):
        assert dry_run.parameters(shapes()[name]) == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize(("seconds", "said"), [(None, "unknown"), (12.4, "12 s"), (600, "10 min"), (9000, "2.5 h")])
def test_seconds_are_said_as_a_person_does(seconds, said):
    assert run_time.shown(seconds) == said
