"""Suites, methods and the command line: bad input is one sentence that names key, value and what is allowed."""

from __future__ import annotations

import re
import sys

import pandas as pd
import pytest
from typer.testing import CliRunner

from resting.baselines.teal import Teal
from resting.benchmarks.cells import expand, identity, registry, suite_file
from resting.benchmarks.cli import main
from resting.benchmarks.errors import BenchmarkError, SuiteError
from resting.benchmarks.report import sections
from resting.method.spontaneous import Spontaneous

GOOD = """
name = "mine"
title = "Mine"
targets = [0.5]
[[methods]]
name = "teal"
"""


@pytest.mark.parametrize("name", suite_file.available())
def test_the_project_s_suites_are_valid(name):
    loaded = suite_file.load(name)
    assert loaded.name == name
    assert expand.cells_of(loaded)


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
            r"evaluation\.texts: 'klingon' is no known text; allowed: ",
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
            r"calibration\.text: 'wikitext2' is no text to fit on",
        ),
        (
            ("[[methods]]", '[tokens]\npolicy = "decode-only"\n[[methods]]'),
            "decode-only leaves every token of a window",
        ),
        (('"teal"', '"spon(teal)"\nparameters = { seed = 3 }'), "a seed is given with `seeds`"),
        (
            ("[[methods]]", '[[policies]]\npolicy = "last-fraction"\n[[methods]]'),
            r"the key 'policies\.0\.targets' is missing",
        ),
        (
            ("[[methods]]", '[[policies]]\npolicy = "all-but-first"\ntargets = [0.5]\n[[methods]]'),
            "policies: all-but-first-1 stands there twice",
        ),
        (
            ("[[methods]]", '[[policies]]\nfraction = 0.5\nn = 3\ntargets = [0.5]\nmethods = ["tea"]\n[[methods]]'),
            "policies: no method 'tea' in the suite; allowed: teal",
        ),
        (
            ("[[methods]]", "[evaluation]\nscored = 512\n[[methods]]"),
            r"evaluation\.scored = 512: must be less than the window, 512",
        ),
        (("targets = [0.5]", "targets = [0.5]\nmodel = 3"), "model"),
    ],
)
def test_bad_suites(tmp_path, change, message):
    path = tmp_path / "mine.toml"
    assert change[0] in GOOD
    path.write_text(GOOD.replace(*change))
    with pytest.raises(SuiteError, match=message):
        suite_file.load(str(path))


def test_a_reference_that_is_no_method(tmp_path):
    (tmp_path / "mine.toml").write_text('reference = "teall"\n' + GOOD)
    with pytest.raises(SuiteError, match="no method 'teall' in the suite; allowed: teal"):
        suite_file.load(str(tmp_path / "mine.toml"))


def test_missing_suites():
    with pytest.raises(SuiteError, match=r"there is no suite 'mian'; allowed: .*baselines.*smoke"):
        suite_file.load("mian")
    with pytest.raises(SuiteError, match=r"there is no suite 'nothing\.toml'"):
        suite_file.load("nothing.toml")


@pytest.mark.parametrize(
    ("expression", "parameters", "message"),
    [
        ("teel", {}, r"unknown method 'teel' \(did you mean 'teal'\?\); allowed: cats, chess, .*, teal-greedy"),
        ("spon", {}, r"method 'spon' must be written spon\(METHOD\)"),
        ("teal(spon)", {}, "must be written teal"),
        ("spon(teel)", {}, "unknown method 'teel'"),
        ("spon(teal", {}, "unknown method"),
        ("spon(teal)", {"stepz": 3}, "has no parameter 'stepz'; allowed: sites, blocks, side"),
        ("spon(teal)", {"steps": 0}, "steps must be at least 1, got 0"),
        ("spon(teal)", {"steps": 2.5}, r"steps = 2\.5: Input should be a valid integer"),
        ("spon(teal)", {"match": "perhaps"}, "match = 'perhaps': Input should be a valid boolean"),
        ("teal", {"target": 0.3}, "has no parameter 'target'; allowed: topk, protocol, allocation"),
        ("teal", {"allocation": "best"}, r"allocation = 'best': Input should be 'uniform' or 'greedy'"),
        ("teal", {"protocol": "mine"}, r"protocol = 'mine': Input should be 'common', 'nominal' or 'original'"),
        ("teal-greedy", {"allocation": "uniform"}, "has allocation = 'greedy' by its name"),
        ("rsparse", {"rho": 1.5}, r"rho must be in \[0, 1\], got 1\.5"),
        ("rsparse-search", {"population": 1}, "population must be at least 2, got 1"),
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


def test_variants_and_inner_parameters():
    built = registry.build("spon(teal-greedy)", 0.4, {"steps": 7}, None, {"step": 0.1})
    assert (built.label, built.inner.allocation, built.inner.step) == ("spon(teal-greedy)", "greedy", 0.1)
    assert registry.build("chess", 0.25, {"attention": True}).label == "chess-attention"
    assert registry.build("cats", 0.25, {"topk": True}).label == "cats-topk"
    assert registry.build("rsparse", 0.25, {"protocol": "original"}).label == "rsparse, original"
    with pytest.raises(SuiteError, match="wraps nothing: `inner` has no meaning"):
        registry.build("teal", 0.4, {"step": 0.1}, None, {"step": 0.1})
    with pytest.raises(SuiteError, match="follows the common protocol, got an inner method of 'original'"):
        registry.build("spon(teal)", 0.4, {}, None, {"protocol": "original"})


def test_policies_add_cells_with_a_dense_one_each():
    cells = expand.cells_of(suite_file.load("smoke"))
    further = [(cell.label, str(cell.policy)) for cell in cells if str(cell.policy) != "all-but-first-1"]
    assert further == [(name, "decode-after-64") for name in ("dense", "teal", "rsparse")]
    assert len({identity.cell_key(cell, {}) for cell in cells}) == len(cells)


def test_the_authors_protocol_brings_its_own_tokens():
    tokens = {cell.label: str(cell.policy) for cell in expand.cells_of(suite_file.load("original"))}
    assert tokens["teal, original"] == "last-0.5"
    assert tokens["cats, original"] == tokens["chess, original"] == "all-but-first-0"
    assert tokens["rsparse, original"] == "last-0.1-rounded-up"


def test_two_rows_of_one_name_are_refused(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + '[[methods]]\nname = "teal"\nparameters = { step = 0.1 }\n')
    with pytest.raises(SuiteError, match="two methods are called 'teal': give one a label"):
        expand.cells_of(suite_file.load(str(path)))


def test_dry_run(monkeypatch, tmp_path):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path))
    done = CliRunner().invoke(main.app, ["run", "original", "--dry-run"])
    assert done.exit_code == 0
    assert len(re.findall("rsparse, original", done.output)) == 3 * 2
    # 6.74e9 weights of two bytes, from the model's card.
    assert "meta-llama/Llama-2-7b-hf: weights to download 13.5 GB; memory 13.5 GB" in done.output
    assert "fitted on 100 x 1024 tokens of refinedweb" in done.output
    assert not list(tmp_path.rglob("*.whl"))


def test_seeds_make_cells_only_for_methods_that_have_one():
    loaded = suite_file.load("spon-whole-texts").model_copy(update={"seeds": [0, 1, 2], "targets": [0.5]})
    cells = [(cell.label, cell.seed) for cell in expand.cells_of(loaded)]
    assert cells == [("dense", 0), ("teal", 0), ("mean-error(teal)", 0), *(("spon(teal)", s) for s in (0, 1, 2))]


def test_methods_from_outside(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(
        "from resting.baselines.teal import Teal\nclass Half(Teal):\n    'Mine.'\n    name = 'half'\nclass No: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cls = registry.load_class("mine:Half")
    assert "half" in [cell.label for cell in expand.cells_of(suite_file.load("smoke"), (cls,))]
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
        (["run", "smoke", "--text", "bible=x"], "the text file x cannot be read"),
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
        main.main()
    error = capsys.readouterr().err
    assert stop.value.code == 2
    assert message in re.sub(r"\s+", " ", error)
    assert "Traceback" not in error


def test_results_of_an_older_version_are_not_reported(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    pd.DataFrame({"metric": ["x"]}).to_csv(folder / "results.csv")
    pd.DataFrame({"metric": ["x"]}).to_parquet(folder / "windows.parquet")
    (folder / "provenance.json").write_text('{"suite": {}, "model": {}}')
    with pytest.raises(BenchmarkError, match="written by an older version: run `resting run old` again"):
        sections.write(folder)


def test_list():
    done = CliRunner().invoke(main.app, ["list"], env={"COLUMNS": "200"})
    assert done.exit_code == 0
    for word in ("baselines", "smoke", "teal", "spon", "smollm2-135m", "wikipedia", "hellaswag", "The cache is "):
        assert word in done.output
