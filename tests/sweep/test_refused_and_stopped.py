"""What cannot be measured is said once and loses nothing else; who stops a run waits for nothing."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from decoders import FAMILIES
from families import SMALL, build
from transformers import AutoConfig, AutoModelForCausalLM
from two_models import rows_of, saved, suite_of

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models
from resting.benchmarks.cells import expand, suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.errors import BenchmarkError, ModelError
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.sweep import execution, jobs
from resting.benchmarks.sweep.execution import Execution
from resting.benchmarks.sweep.mode import ExecutorName, Mode
from resting.benchmarks.sweep.store import Store
from resting.sparsifier import DivergedError, SparsifierError, TargetUnreachableError


def unsupported(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    # The one multiplies its logits with what others divide by, the other divides its hidden states, by 32 / 11.
    scale = {"hyperclovax": {"logits_scaling": 8.0}, "minicpm3": FAMILIES["minicpm3"] | {"dim_model_base": 11}}[kind]
    made = AutoConfig.for_model(kind, **(SMALL | scale))
    return saved(AutoModelForCausalLM.from_config(made).eval(), folder / kind)


@pytest.mark.parametrize("kind", ["hyperclovax", "minicpm3"])
@pytest.mark.parametrize("how", [(), ("--executor", "submitit")], ids=["serial", "submitit"])
def test_an_unsupported_model_is_refused_once(here, monkeypatch, capsys, kind, how):
    if how:  # the worker is another process, which knows no made up texts: it is called here, as there
        monkeypatch.setattr(execution, "_wait", lambda runs, job, under_way: jobs.run_job(job))
    folder = unsupported(kind, here)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", str(folder), *how) == 2
    error = capsys.readouterr().err
    assert error.count("changes its logits") == 1
    assert not list(Store.default().keys())
    assert not (here / "results").exists()


def test_a_refused_model_leaves_the_others(here, monkeypatch, capsys):
    unsupported("hyperclovax", here)
    assert tiny.resting(monkeypatch, "run", suite_of(here, "hyperclovax", "a/model")) == 1
    error = capsys.readouterr().err
    assert error.count("changes its logits") == 1
    assert "hyperclovax was left out: " in error
    rows = rows_of(here / "results" / "mine")
    assert set(rows.model) == {"model"}
    assert rows.value.notna().all()


def test_a_run_whose_cells_are_cached_loads_nothing(here, monkeypatch):
    run = ["run", "mine.toml", "--model", "a/model"]
    assert tiny.resting(monkeypatch, *run) == 0

    def loads(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(models.ModelSource, "load", loads)
    assert tiny.resting(monkeypatch, *run) == 0


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (TargetUnreachableError("no such target"), "skipped"),
        (RuntimeError("no kernel"), "failed"),
        (DivergedError("a loss is NaN"), "diverged"),
    ],
)
def test_a_run_without_any_number_says_why_once(here, monkeypatch, capsys, error, status):
    def fails(*_):
        raise error

    monkeypatch.setattr(Teal, "fit_calibrated", fails)
    text = tiny.SUITE.replace('[[methods]]\nname = "dense"\n', "").replace("[0.5]", "[0.3, 0.5, 0.6]")
    (here / "mine.toml").write_text(text)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 1
    said = capsys.readouterr().err.split("none of 3 cells has a number")
    assert len(said) == 2
    assert said[1].count(str(error)) == 1
    assert {one.status for one in map(Store.default().load, Store.default().keys())} == {status}


def times(factor: float, folder: Path) -> Path:
    """The tiny model with weights so large that its logits overflow."""
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight.mul_(factor)
    model.model.norm.weight.data.mul_(factor)
    return saved(model, folder)


def test_an_overflowing_model_diverges_and_is_not_tried_again(here, monkeypatch, capsys):
    folder = times(1e20, here / "large")
    loads = []
    load = models.ModelSource.load
    monkeypatch.setattr(models.ModelSource, "load", lambda *of: loads.append(1) or load(*of))
    run = ["run", "mine.toml", "--model", str(folder)]
    assert tiny.resting(monkeypatch, *run) == 1
    error = capsys.readouterr().err
    assert "changes its logits" not in error
    assert "none of 2 cells has a number" in error
    assert len(loads) == 1
    facts = (here / "results" / "mine-large" / "provenance.json").read_text()
    json.loads(facts, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert {cell["status"] for cell in json.loads(facts)["cells"]} == {"diverged"}
    rows = rows_of(here / "results" / "mine-large")
    assert rows.value.isna().all()
    assert rows.reason.str.startswith("diverged: ").all()
    assert tiny.resting(monkeypatch, *run) == 1
    assert len(loads) == 1


def test_what_is_finite_is_kept_where_a_perplexity_overflows(here, monkeypatch, capsys):
    """Of exp(nats) above what a float holds; KL and the dense model are numbers."""
    folder = times(40.0, here / "sharp")
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", str(folder)) == 0
    assert "2 of 2 cells diverged" in capsys.readouterr().err
    rows = rows_of(here / "results" / "mine-sharp").set_index(["method", "metric"])
    for method in ("dense", "teal"):
        nats = pd.read_parquet(here / "results" / "mine-sharp" / "windows.parquet")
        mean = nats[(nats.method == method) & (nats.metric == "wikipedia_nll")].value.mean()
        assert mean > np.log(sys.float_info.max)
        assert np.isnan(rows.value[method, "wikipedia_perplexity"])
        assert rows.reason[method, "wikipedia_perplexity"] == "diverged: the value is inf"
    assert rows.value["dense", "wikipedia_kl"] == 0.0
    assert rows.value["teal", "wikipedia_kl"] > 0.0
    text = (here / "results" / "mine-sharp" / "README.md").read_text()
    assert "diverged: the value is inf" in text
    for file in (here / "cache" / "cells").glob("*.json"):
        json.loads(file.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_a_diverged_method_keeps_the_others(here, monkeypatch):
    def fails(*_):
        raise DivergedError("the loss became nan at step 3")

    monkeypatch.setattr(Teal, "fit_calibrated", fails)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 0
    rows = rows_of(here / "results" / "mine-model")
    assert rows[rows.method == "dense"].value.notna().all()
    assert set(rows[rows.method == "teal"].reason) == {"diverged: the loss became nan at step 3"}


@pytest.mark.parametrize("which", ["all", "some"])
def test_failures_are_listed_where_workers_died(here, monkeypatch, capsys, which):
    def dies(runs, job, under_way):
        if which == "all" or job.label == "teal":
            raise RuntimeError("the node is gone")
        return jobs.run_job(job)

    monkeypatch.setattr(execution, "_wait", dies)
    run = ["run", "mine.toml", "--model", "a/model", "--executor", "submitit"]
    assert tiny.resting(monkeypatch, *run) == 1
    error = capsys.readouterr().err
    assert "its worker ended: RuntimeError: the node is gone" in error
    assert "KeyError" not in error
    folder = here / "results" / "mine-model"
    assert "its worker ended" in (folder / "README.md").read_text()
    assert tiny.resting(monkeypatch, "report", "mine-model") == 0
    assert tiny.resting(monkeypatch, "page") == 0


def test_failures_are_listed_where_the_report_fails(here, monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("no kernel")

    def breaks(*_):
        raise BenchmarkError("the report cannot be written")

    monkeypatch.setattr(Teal, "fit_calibrated", fails)
    monkeypatch.setattr("resting.benchmarks.run.readme.write", breaks)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 2
    error = capsys.readouterr().err
    assert "teal at 0.5: failed, RuntimeError: no kernel" in error
    assert "the report cannot be written" in error


def test_who_stops_a_run_waits_for_no_plot(here, monkeypatch, capsys):
    def stops(*_):
        raise KeyboardInterrupt

    def draws(*_, **__):
        raise AssertionError("a report was written")

    monkeypatch.setattr(Teal, "fit_calibrated", stops)
    monkeypatch.setattr("resting.benchmarks.run.readme.write", draws)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 130
    streams = capsys.readouterr()
    assert "stopped after 1 cells: the same command goes on from here" in streams.err
    assert "Traceback" not in streams.err
    assert rows_of(here / "results" / "mine-model.partial").value.notna().all()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    monkeypatch.setenv("RESTING_CACHE", str(here / "cache"))
    tiny.provide_texts(monkeypatch)
    assert tiny.resting(monkeypatch, "report", "mine-model.partial") == 0
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 0
    assert not (here / "results" / "mine-model.partial").exists()


def test_who_stops_a_distributed_run_does_not_wait_for_its_jobs(here, monkeypatch):
    cancelled = []

    class Submitted:
        def result(self):
            deadline = time.monotonic() + 60
            while not cancelled and time.monotonic() < deadline:
                time.sleep(0.01)
            raise RuntimeError("cancelled")

        def cancel(self):
            cancelled.append(self)

    class Runs:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def submit(self, *_):
            return Submitted()

    monkeypatch.setattr(execution, "executor", lambda *_: Runs())
    suite = suite_file.load("mine.toml")
    made = jobs.jobs_of(
        suite, expand.cells_of(suite), Options(here), [models.resolve("a/model")], {}, Mode.ONLY_MISSING
    )

    class Stopped(Console):
        def begin(self, *_):
            while not started:
                time.sleep(0.01)
            raise KeyboardInterrupt

    started = []
    monkeypatch.setattr(Runs, "submit", lambda self, *_: started.append(1) or Submitted())
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        Execution(executor=ExecutorName.SUBMITIT, workers=2).distribute(made, Stopped(quiet=True))
    assert time.monotonic() - began < 5
    assert cancelled


def test_the_model_of_a_study_is_refused_in_one_sentence(here):
    folder = unsupported("hyperclovax", here)
    suite = suite_file.load("mine.toml")
    loaded = LoadedModel(suite, models.resolve(str(folder)), "cpu", lambda *_: None)
    with pytest.raises(ModelError, match="hyperclovax cannot be measured: HyperCLOVAXForCausalLM changes its logits"):
        loaded.model  # noqa: B018
    assert not issubclass(ModelError, SparsifierError)


def test_a_process_that_is_interrupted_ends_at_once(here):
    """With code 130, and no traceback."""
    code = (
        "import signal, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background job ignores it
        "from resting.benchmarks.cli import main\n"
        "def sleeps(standalone_mode):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "main.app = sleeps\nmain.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=10)
    assert process.returncode == 130
    assert b"Traceback" not in error


def test_what_is_forced_and_lost_is_not_shown_as_it_was(here, monkeypatch, capsys):
    """Numbers of an earlier run do not stand for cells that were to be measured again."""
    run = ["run", "mine.toml", "--model", "a/model"]
    assert tiny.resting(monkeypatch, *run) == 0

    def dies(runs, job, under_way):
        if job.label == "teal":
            raise RuntimeError("the node is gone")
        return jobs.run_job(job)

    with monkeypatch.context() as patch:
        patch.setattr(execution, "_wait", dies)
        assert tiny.resting(monkeypatch, *run, "--executor", "submitit") == 0  # nothing is missing
        assert tiny.resting(monkeypatch, *run, "--executor", "submitit", "--mode", "force") == 1
    assert "its worker ended: RuntimeError: the node is gone" in capsys.readouterr().err
    rows = rows_of(here / "results" / "mine-model")
    assert rows[rows.method == "dense"].value.notna().all()
    assert rows[rows.method == "teal"].value.isna().all()
    assert tiny.resting(monkeypatch, *run) == 0
    assert rows_of(here / "results" / "mine-model").value.notna().all()
