"""Results name what they are of, replace no others, and a run that gives none says why once."""

from __future__ import annotations

import json
import os
import shutil
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

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models
from resting.benchmarks.cells import expand, suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.checks import verify
from resting.benchmarks.errors import BenchmarkError, ModelError, SuiteError
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.sweep import execution, jobs
from resting.benchmarks.sweep.execution import Execution
from resting.benchmarks.sweep.mode import ExecutorName, Mode
from resting.benchmarks.sweep.sources import told_apart
from resting.benchmarks.sweep.store import Store
from resting.sparsifier import DivergedError, SparsifierError, TargetUnreachableError


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two models called ``model``, and a suite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    tiny.provide_texts(monkeypatch)
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    for number, parent in enumerate("ab"):
        saved(build("llama", seed=number), tmp_path / parent / "model")
    return tmp_path


def suite_of(here: Path, *names: str) -> str:
    text = tiny.SUITE.replace("targets", f"model = {list(names)}\ntargets")
    (here / "both.toml").write_text(text)
    return "both.toml"


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv", dtype={"weights": str})


def test_two_models_of_one_name_are_two_everywhere(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "run", suite_of(here, "a/model", "b/model")) == 0
    rows = rows_of(here / "results" / "mine")
    alone = {}
    for parent in "ab":
        assert (
            tiny.resting(monkeypatch, "run", "mine.toml", "--model", f"{parent}/model", "--output", parent + "-out")
            == 0
        )
        alone[parent] = rows_of(here / f"{parent}-out" / "mine-model")
    for parent in "ab":
        mine = rows[rows.model == f"{parent}/model"]
        assert mine.value.tolist() == alone[parent].value.tolist()
        assert set(mine.weights) == {models.resolve(f"{parent}/model").sha256[:12]} == set(alone[parent].weights)
    text = (here / "results" / "mine" / "README.md").read_text()
    for parent in "ab":
        value = alone[parent].query("method == 'teal' and metric == 'wikipedia_kl'").value.item()
        section = text.split(f"# {parent}/model\n")[1].split("\n# ")[0]
        assert f"{value:.3f} ± " in section  # of this model, and no mean of both
    singles = pd.read_parquet(here / "results" / "mine" / "windows.parquet")
    assert set(singles.model) == {"a/model", "b/model"}


def test_cells_are_verified_against_rows_of_their_own_weights(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "run", suite_of(here, "a/model", "b/model")) == 0
    for parent in "ab":
        found = verify.verify(
            here / "results" / "mine", Options(here, model=f"{parent}/model"), 2, 0, 0.0, Console(quiet=True)
        )
        assert len(found) == 4
        assert all(one.agrees for one in found)
    other = saved(build("llama", seed=2), here / "c" / "model")
    assert tiny.resting(monkeypatch, "verify", "mine", "--model", str(other)) == 2
    assert f"has no numbers of the weights {models.resolve(str(other)).sha256[:12]}" in capsys.readouterr().err


def test_names_are_told_apart_by_folder_else_by_hash(tmp_path):
    def source(name, folder, digit):
        return models.ModelSource(name, tmp_path / folder, digit * 64)

    apart = [source("m", "a/m", "1"), source("m", "b/m", "2"), source("n", "n", "3")]
    assert [one.name for one in told_apart(apart)] == ["a/m", "b/m", "n"]
    ggufs = [source("m (Q4_1)", "models/1", "1"), source("m (Q4_1)", "models/2", "2")]
    assert [one.name for one in told_apart(ggufs)] == [f"m@{digit * 12} (Q4_1)" for digit in "12"]
    deep = [source("m", "x/a/m", "1"), source("m", "y/a/m", "2")]
    assert [one.name for one in told_apart(deep)] == [f"m@{digit * 12}" for digit in "12"]
    with pytest.raises(SuiteError, match="is named 2 times; allowed: once"):
        told_apart([source("m", "a/m", "1"), source("m", "b/m", "1")])


@pytest.mark.parametrize(
    ("again", "said"),
    [
        (["--model", "b/model"], "holds results of the weights "),
        (
            ["--model", "a/model", "--dtype", "bfloat16"],
            "holds results of the dtype float32, and this run is",
        ),
    ],
)
def test_results_of_other_weights_or_dtype_are_not_replaced(here, monkeypatch, capsys, again, said):
    run = ["run", "mine.toml", "--output", "out"]
    assert tiny.resting(monkeypatch, *run, "--model", "a/model") == 0
    if "--dtype" in again:  # by hand: the usual folder of another dtype has another name
        shutil.copytree("out/mine-model", "out/mine-model-bfloat16")
    before = tiny.contents(here / "out")
    measured = len(list(Store.default().keys()))
    capsys.readouterr()
    assert tiny.resting(monkeypatch, *run, *again) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "give another --output, or delete that folder" in error
    assert tiny.contents(here / "out") == before
    assert len(list(Store.default().keys())) == measured  # refused before anything was measured
    assert tiny.resting(monkeypatch, *run, "--model", "a/model") == 0  # again, as `tox -e bench` does


def test_results_of_another_suite_are_not_replaced(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 0
    other = tiny.SUITE.replace('name = "mine"', 'name = "mine-model"').replace("targets", 'model = "a/model"\ntargets')
    (here / "other.toml").write_text(other)
    assert tiny.resting(monkeypatch, "run", "other.toml") == 2
    assert "holds results of the suite mine, and this run is of mine-model" in capsys.readouterr().err


def test_a_study_of_another_model_is_not_replaced(here, monkeypatch, capsys):
    folder = here / "out" / "mine-model-shift"
    folder.mkdir(parents=True)
    sha256 = models.resolve("a/model").sha256
    about = {"suite": {"name": "mine", "dtype": "float32"}, "model": {"name": "model", "sha256": sha256}}
    (folder / "provenance.json").write_text(json.dumps(about))
    study = ["study", "shift", "mine.toml", "--model", "b/model", "--output", "out"]
    assert tiny.resting(monkeypatch, *study) == 2
    assert f"holds results of the weights {sha256[:12]} (model)" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="POSIX only")
@pytest.mark.parametrize("blocked", ["out", "out/mine-model", "out/mine-model/results.csv"])
def test_what_cannot_be_written_is_found_out_before_measuring(here, monkeypatch, capsys, blocked):
    path = here / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix:
        path.mkdir()
    else:
        path.write_text("a file")
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model", "--output", "out") == 2
    error = capsys.readouterr().err
    assert "error: --output: " in error
    assert f"{blocked} is " in error
    assert not list(Store.default().keys())


def test_a_read_only_folder_is_found_out_before_measuring(here, monkeypatch, capsys):
    def refuses(**_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("resting.benchmarks.sweep.output.tempfile.TemporaryFile", refuses)
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 2
    assert "is no folder that can be written to" in capsys.readouterr().err
    assert not list(Store.default().keys())


@pytest.mark.parametrize("option", [["--model", "a/model"], ["--dtype", "bfloat16"]])
def test_a_suite_of_times_takes_no_other_model(here, monkeypatch, capsys, option):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "latency", *option) == 2
    assert not (here / "results").exists()  # of the suite before it, either
    assert f"{' '.join(option)}: suite latency measures time" in capsys.readouterr().err


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
