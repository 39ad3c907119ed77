"""Suites, methods and the command line: bad input is one sentence that names key, value and what is allowed."""

from __future__ import annotations

import re
import sys

import pytest
from typer.testing import CliRunner

from baselines.teal import Teal
from benchmarks import cli, registry, runner, suite
from benchmarks.errors import SuiteError
from method.spontaneous import Spontaneous

GOOD = """
name = "mine"
title = "Mine"
targets = [0.5]
[[methods]]
name = "teal"
"""


@pytest.mark.parametrize("name", suite.available())
def test_the_project_s_suites_are_valid(name):
    loaded = suite.load(name)
    assert loaded.name == name
    assert runner.cells_of(loaded)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("targets = [0.5]", "targts = [0.5]"), r"unknown key 'targts'; allowed here: name, title"),
        (("targets = [0.5]", ""), "the key 'targets' is missing"),
        (("[0.5]", "[1.0]"), r"targets\.0 = 1\.0: must be less than 1"),
        (("[0.5]", "[-0.5]"), r"targets\.0 = -0\.5: must be greater than or equal to 0"),
        (("[0.5]", '["half"]'), r"targets\.0 = 'half': must be a valid number"),
        (('name = "mine"', 'name = "../mine"'), r"name = '\.\./mine'"),
        (("targets", 'dtype = "int8"\ntargets'), r"dtype = 'int8': must be 'float32' or 'bfloat16'"),
        (
            ("[[methods]]", '[evaluation]\ntexts = ["klingon"]\n[[methods]]'),
            r"evaluation\.texts\.0 = 'klingon': must be",
        ),
        (("[[methods]]", "[evaluation]\nwindow = 1\n[[methods]]"), r"evaluation\.window = 1"),
        (
            ("[[methods]]", "[evaluation]\nwidow = 64\n[[methods]]"),
            r"unknown key 'evaluation\.widow'; allowed here: texts",
        ),
        (
            ("[[methods]]", '[tokens]\npolicy = "none"\n[[methods]]'),
            r"tokens\.policy = 'none': must be 'all-but-first'",
        ),
        (('[[methods]]\nname = "teal"', "methods = []"), r"methods = \[\]"),
        (('"teal"', '"teal"\n[[methods]]\nname = "teal"'), "two methods are called 'teal'"),
        (("targets = [0.5]", "targets = [0.5"), "is not TOML"),
        (("[0.5]", "[]"), r"targets = \[\]"),
        (("[0.5]", "[0.5, 0.5]"), r"targets: 0\.5 stands there twice"),
        (
            ("[[methods]]", '[calibration]\ntext = "wikitext2"\n[[methods]]'),
            r"calibration\.text = 'wikitext2': must be",
        ),
        (
            ("[[methods]]", '[tokens]\npolicy = "decode-only"\n[[methods]]'),
            "decode-only leaves every token of a window",
        ),
        (('"teal"', '"spon(teal)"\nparameters = { seed = 3 }'), "a seed is given with `seeds`"),
    ],
)
def test_bad_suites(tmp_path, change, message):
    path = tmp_path / "mine.toml"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change))
    with pytest.raises(SuiteError, match=message):
        suite.load(str(path))


def test_missing_suites():
    with pytest.raises(SuiteError, match=r"there is no suite 'mian'; allowed: .*main.*smoke"):
        suite.load("mian")
    with pytest.raises(SuiteError, match=r"there is no suite 'nothing\.toml'"):
        suite.load("nothing.toml")


@pytest.mark.parametrize(
    ("expression", "parameters", "message"),
    [
        ("teel", {}, r"unknown method 'teel' \(did you mean 'teal'\?\); allowed: dense, mean-error, spon, teal"),
        ("spon", {}, r"method 'spon' must be written spon\(METHOD\)"),
        ("teal(spon)", {}, "must be written teal"),
        ("spon(teel)", {}, "unknown method 'teel'"),
        ("spon(teal", {}, "unknown method"),
        ("spon(teal)", {"stepz": 3}, "has no parameter 'stepz'; allowed: sites, steps, batch"),
        ("spon(teal)", {"steps": 0}, "steps must be at least 1, got 0"),
        ("spon(teal)", {"steps": 2.5}, r"steps = 2\.5: Input should be a valid integer"),
        ("spon(teal)", {"match": "perhaps"}, "match = 'perhaps': Input should be a valid boolean"),
        ("teal", {"target": 0.3}, "has no parameter 'target'; allowed: none"),
    ],
)
def test_bad_methods(expression, parameters, message):
    with pytest.raises(SuiteError, match=message):
        registry.build(expression, 0.5, parameters)


def test_expressions():
    built = registry.build("spon(teal)", 0.4, {"steps": 7})
    assert isinstance(built, Spontaneous)
    assert isinstance(built.inner, Teal)
    assert (built.label, built.target, built.steps) == ("spon(teal)", 0.4, 7)


def test_seeds_make_cells_only_for_methods_that_have_one():
    loaded = suite.load("main").model_copy(update={"seeds": [0, 1, 2], "targets": [0.5]})
    cells = [(cell.label, cell.seed) for cell in runner.cells_of(loaded)]
    assert cells == [("dense", 0), ("teal", 0), ("mean-error(teal)", 0), *(("spon(teal)", s) for s in (0, 1, 2))]


def test_methods_from_outside(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from baselines.teal import Teal\nclass Half(Teal):\n    'Mine.'\n    name = 'half'\nclass No: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cls = registry.load_class("mine:Half")
    assert "half" in [cell.label for cell in runner.cells_of(suite.load("smoke"), (cls,))]
    for path, message in [
        ("mine", "package.module:Class"),
        ("mine:Nothing", "has no attribute"),
        ("mine:No", "is not a concrete subclass"),
        ("nowhere:Half", "No module named"),
    ]:
        with pytest.raises(SuiteError, match=message):
            registry.load_class(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "mian"], "there is no suite 'mian'"),
        (["run", "smoke", "--method", "x"], "package.module:Class"),
        (["run", "smoke", "--device", "tpu"], "--device 'tpu'; allowed: cpu"),
        (["run", "smoke", "--text", "wikitext2"], "--text takes NAME=FILE"),
        (["run", "smoke", "--text", "wikitext2=nothing.txt"], "nothing.txt cannot be read"),
        (["run", "smoke", "--text", "bible=x"], "--text takes wikitext2=FILE, got bible"),
        (["run", "smoke", "--model", "no-such-model"], "no model 'no-such-model'"),
        (["run", "smoke", "--model", "nothing.gguf"], "there is no GGUF file nothing.gguf"),
        (["run", "smoke", "--model", "someone/something"], "hub model 'someone/something' cannot be had"),
        (["fetch", "moon"], "unknown asset 'moon'; allowed: smollm2-135m, wikitext2, wikipedia"),
        (["report", "nothing"], "no results in results/nothing"),
    ],
)
def test_a_bad_command_ends_with_one_sentence_and_code_2(monkeypatch, capsys, arguments, message):
    monkeypatch.setattr(sys, "argv", ["resting", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in re.sub(r"\s+", " ", error)
    assert "Traceback" not in error


def test_list():
    done = CliRunner().invoke(cli.app, ["list"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for word in ("main", "smoke", "teal", "spon", "smollm2-135m", "wikipedia", "cache:"):
        assert word in done.output
