"""Results name what they are of, replace no others, and a run that gives none says why once."""

from __future__ import annotations

import json
import os
import shutil

import pandas as pd
import pytest
import tiny
from families import build
from two_models import rows_of, saved, suite_of

from resting.benchmarks import run
from resting.benchmarks.assets import models
from resting.benchmarks.cells import suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.checks import verify
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.progress import Console
from resting.benchmarks.quality import measure
from resting.benchmarks.sweep.execution import Execution
from resting.benchmarks.sweep.mode import Mode
from resting.benchmarks.sweep.sources import told_apart
from resting.benchmarks.sweep.store import Store
from resting.sparsifier import SparsifierError


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


@pytest.mark.parametrize(
    "option",
    [
        "--model a/model",
        "--dtype bfloat16",
        "--mode only-cache",
        "--executor processes",
        "--shard 1/2",
    ],
)
def test_a_suite_of_times_takes_nothing_that_is_for_cells(here, monkeypatch, capsys, option):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "latency", *option.split()) == 2
    assert not (here / "results").exists()  # of the suite before it, either
    error = capsys.readouterr().err
    assert f"error: {option.removesuffix(' 1/2')}: suite latency measures time" in error


def test_a_device_that_a_suite_of_times_has_nothing_for_is_refused_before_another_suite_runs(here, monkeypatch, capsys):
    for more in ([], ["--dry-run"]):
        assert tiny.resting(monkeypatch, "run", "mine.toml", "latency-8b", *more) == 2
        assert "suite latency-8b has nothing to time on cpu; allowed: --device cuda" in capsys.readouterr().err
    assert not (here / "results").exists()


def test_a_dry_run_lists_all_parts_or_none(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model", "--dry-run", "--shard", "1/2") == 2
    assert "error: --shard 1/2: --dry-run lists all parts" in capsys.readouterr().err


def test_what_looks_at_one_model_does_not_choose_it(here, monkeypatch, capsys):
    suite = suite_of(here, "a/model", "b/model")
    assert tiny.resting(monkeypatch, "run", suite) == 0
    for command in (["study", "union", suite], ["verify", "mine"]):
        capsys.readouterr()
        assert tiny.resting(monkeypatch, *command) == 2
        error = capsys.readouterr().err
        assert "has 2 models, and one is looked at; allowed: --model with one of a/model, b/model" in error


def test_a_suite_of_times_is_refused_by_the_api_as_well(here):
    with pytest.raises(SuiteError, match="--mode only-cache: suite latency-short measures time"):
        run.run(suite_file.load("latency-short"), Options(here), execution=Execution(Mode.ONLY_CACHE))


def test_a_number_that_there_is_none_for_any_more_is_named(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 0
    folder = here / "results" / "mine-model"
    renamed = pd.read_csv(folder / "results.csv")
    renamed.metric = renamed.metric.where((renamed.metric != "wikipedia_kl") | (renamed.method != "dense"), "of_old")
    renamed.to_csv(folder / "results.csv", index=False)

    def refuses(loaded, cell):
        if cell.config.name == "teal":
            raise SparsifierError("a mask that is refused now")
        return fitted(loaded, cell)

    fitted = measure.fitted
    monkeypatch.setattr(measure, "fitted", refuses)
    found = verify.verify(folder, Options(here, model="a/model"), 2, 0, 0.0, Console(quiet=True))
    said = {one.name: (one.agrees, one.reason) for one in found}
    none = (False, "a mask that is refused now")
    assert said == {
        "dense at 0: wikipedia_perplexity": (True, ""),
        "dense at 0: of_old": (False, "this metric is not measured, the cell is done"),
        "teal at 0.5: wikipedia_perplexity": none,
        "teal at 0.5: wikipedia_kl": none,
    }
    capsys.readouterr()
    assert tiny.resting(monkeypatch, "verify", "mine-model", "--model", "a/model") == 1
    output = capsys.readouterr()
    assert output.out.count("no number now: a mask that is refused now") == 2
    assert "3 of 4 numbers differ by more than 0.01, 3 of them have no number now" in output.err
