"""The command ``resting fit``: what it prints and writes, what it refuses, and a kill in the middle."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from fits import WINDOW, assert_same, documents

from resting.benchmarks.assets import models
from resting.method.checkpoint import Checkpoint
from resting.sparsifier import Plan

FIT = ("fit", "--model", "model", "--text", "mine.txt", "--window", str(WINDOW), "-o", "plan")
TEAL = (*FIT, "--method", "teal")
TRAINED = (*FIT, "--method", "spon-refined(teal)", "--steps", "8")
TRAINED += tuple(
    word for value in (f"window={WINDOW}", "batch=4", "match_every=2", "warmup=2") for word in ("--parameter", value)
)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model and a text; no network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)  # as the runner of the tests has them
    shutil.copytree(tiny.once("model", tiny.model_folder), tmp_path / "model")
    (tmp_path / "mine.txt").write_text("\n".join(documents()))
    return tmp_path


def test_it_prints_what_was_measured_and_writes_the_plan(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, *TRAINED, "--target", "0.4") == 0
    said, plan = capsys.readouterr().out, Plan.load("plan")
    measured = plan.info["measured"]
    shown = {name: f"{measured[name]:.3f}" for name in ("byte_sparsity", "dense_loss", "sparse_loss")}
    for label, value in (
        ("target, bytes left unread", "0.400"),
        ("measured, bytes left unread", shown["byte_sparsity"]),
        ("loss, dense", shown["dense_loss"]),
        ("loss, sparse", shown["sparse_loss"]),
        ("difference", f"{measured['difference']:+.3f}"),
        ("measured on", "mine.txt, held out, 225 tokens"),
        ("plan", "plan"),
    ):
        assert re.search(rf"│ {re.escape(label)} +│ {re.escape(value)}", said), (label, value, said)
    assert said.splitlines()[-1] == 'next: resting generate --plan plan --prompt "..."'
    assert plan.info["fitted"]["parameters"]["batch"] == 4
    assert plan.info["fitted"]["model"] == "model"
    assert models.resolve(plan.info["fitted"]["source"]).sha256 == plan.info["fitted"]["weights"]
    assert {path.name for path in here.iterdir()} == {"model", "mine.txt", "plan"}


def test_the_dtype_is_that_of_the_command(here, monkeypatch):
    assert tiny.resting(monkeypatch, *TEAL, "--dtype", "bfloat16") == 0
    assert Plan.load("plan").info["fitted"]["dtype"] == "bfloat16"


def test_parameters_are_as_in_a_suite(here, monkeypatch):
    more = ("--method", "mean-error(teal)", "--parameter", 'sites=["down", "o"]', "--inner", "topk=true")
    assert tiny.resting(monkeypatch, *FIT, *more) == 0
    plan = Plan.load("plan")
    assert plan.method == "mean-error(teal-topk)"
    assert {site.role for site, rule in plan.rules.items() if rule.bias is not None} == {"down", "o"}


def test_a_plan_is_replaced_only_if_asked_to(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, *TEAL) == 0
    before = tiny.contents(here)
    assert tiny.resting(monkeypatch, *TEAL, "--target", "0.3") == 2
    assert (
        "error: --output plan holds a plan already; allowed: another folder, or --overwrite" in capsys.readouterr().err
    )
    assert tiny.contents(here) == before
    assert tiny.resting(monkeypatch, *TEAL, "--target", "0.3", "--overwrite") == 0
    assert Plan.load("plan").target == 0.3


def test_an_empty_folder_will_do(here, monkeypatch):
    (here / "plan").mkdir()
    assert tiny.resting(monkeypatch, *TEAL) == 0
    assert Plan.load("plan").method == "teal"


REFUSED = {
    "no method": (("--method", "teel"), "unknown method 'teel' (did you mean 'teal'?)"),
    "a target in percent": (("--target", "50"), "target = 50.0: must be a number between 0 and 1"),
    "a target that is text": (("--target", "half"), "Invalid value for '--target': "),
    "no target": (("--target", "nan"), "target = nan: must be a number between 0 and 1"),
    "an unknown text": (("--text", "wikipaedia"), "there is no text 'wikipaedia'; allowed: wikipedia, papers, "),
    "a test set": (("--text", "wikitext2"), "wikitext2 is a test set: calibrate on another text"),
    "what is not there, held out": (("--held-out", "no.txt"), "there is no text 'no.txt'; allowed: wikitext2, wiki"),
    "what is not cached, held out": (("--held-out", "wikitext2"), "give the path of its file"),
    "a device that is not there": (("--device", "cuda:99"), "--device 'cuda:99'; allowed: cpu"),
    "an unknown dtype": (("--dtype", "int8"), "--dtype 'int8'; allowed: float32, bfloat16"),
    "no model": (("--model", ""), "--model '' names none; allowed: a folder"),
    "a window of nothing": (("--window", "1"), "window = 1: must be a whole number, at least 8"),
    "no windows": (("--windows", "0"), "windows = 0: must be a whole number, at least 1"),
    "steps of no training": (("--steps", "4"), "method 'teal' has no parameter 'steps'"),
    "a seed of no chance": (("--seed", "4"), "method 'teal' has no parameter 'seed'"),
    "a window below training": (("--method", "spon(teal)"), "spon(teal) trains on windows of 128 tokens"),
    "a parameter without value": (("--parameter", "step"), "--parameter takes NAME=VALUE, got 'step'"),
    "a parameter of another type": (("--parameter", "step=many"), "step = 'many': Input should be a valid number"),
    "a file as output": (("-o", "mine.txt"), "--output mine.txt exists and is no plan; allowed: a new folder"),
    "a folder of something": (("-o", "model", "--overwrite"), "--output model exists and is no plan"),
    "an output below a file": (("-o", "mine.txt/plan"), "mine.txt is no folder that can be written to"),
}


@pytest.mark.parametrize(("more", "said"), REFUSED.values(), ids=REFUSED)
def test_what_will_not_do_is_refused_before_the_model_is_looked_for(here, monkeypatch, capsys, more, said):
    monkeypatch.setattr(models, "resolve", lambda *a, **k: pytest.fail("a model was looked for"))
    (here / "cache").mkdir()
    before = tiny.contents(here)
    assert tiny.resting(monkeypatch, *TEAL, *more) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert said in lines[0]
    assert tiny.contents(here) == before


def test_what_cannot_be_fitted_leaves_nothing_behind(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, *FIT, "--method", "cats", "--target", "0.9") == 2
    assert "error: byte sparsity 0.9 is above this method's ceiling of 0." in capsys.readouterr().err
    assert {path.name for path in here.iterdir()} == {"model", "mine.txt"}


LATER = {
    "no such model": (("--model", "nowhere"), "no model 'nowhere'"),
    "a window above the model": (("--window", "65"), "--window = 65: model has 64 positions; allowed: up to 64"),
    "too many windows": (("--windows", "900"), "mine.txt has 2400 tokens to fit on and to measure on, and 14416 are"),
}


@pytest.mark.parametrize(("more", "said"), LATER.values(), ids=LATER)
def test_what_the_model_cannot_do_is_refused_before_it_is_loaded(here, monkeypatch, capsys, more, said):
    monkeypatch.setattr(models.ModelSource, "load", lambda *a: pytest.fail("the model was loaded"))
    assert tiny.resting(monkeypatch, *TEAL, *more) == 2
    assert said in capsys.readouterr().err
    assert not (here / "plan").exists()


def test_ctrl_c_keeps_what_was_done_and_says_so(here, monkeypatch, capsys):
    save, saved = Checkpoint.save, []

    def stopping(checkpoint, state, *more):
        save(checkpoint, state, *more)
        saved.append(state.step)
        if state.step == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", stopping)
    assert tiny.resting(monkeypatch, *TRAINED) == 130
    assert f"stopped: {here / 'plan.part'} has what was done, and the same command goes on" in capsys.readouterr().err
    assert not (here / "plan").exists()
    monkeypatch.undo()
    monkeypatch.chdir(here)
    assert (here / "plan.part").is_dir()


KILLED = """
import os, signal, sys
from resting.method.checkpoint import Checkpoint
save = Checkpoint.save
def killing(checkpoint, state, *more):
    save(checkpoint, state, *more)
    if state.step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = killing
from resting.benchmarks.cli.main import main
main()
"""


def test_a_fit_that_was_killed_goes_on_and_ends_alike(here, monkeypatch):
    killed = subprocess.run([sys.executable, "-P", "-c", KILLED, *TRAINED], env=os.environ, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not Path("plan").exists()
    assert list(Path("plan.part").rglob("*.safetensors"))
    save, steps = Checkpoint.save, []
    monkeypatch.setattr(Checkpoint, "save", lambda c, state, *more: steps.append(state.step) or save(c, state, *more))
    assert tiny.resting(monkeypatch, *TRAINED) == 0
    assert steps == [6, 8]
    assert not Path("plan.part").exists()
    assert tiny.resting(monkeypatch, *TRAINED, "-o", "whole") == 0
    assert steps == [6, 8, 2, 4, 6, 8]
    assert_same(Plan.load("plan"), Plan.load("whole"))
