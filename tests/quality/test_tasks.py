"""Tasks: built from their data, asked as stock lm-eval asks them, in a suite."""

from __future__ import annotations

import json
from functools import cache as memoise
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihoods import close

from resting.benchmarks import run
from resting.benchmarks.cells import suite_file as suites
from resting.benchmarks.cells.options import Options
from resting.benchmarks.errors import AssetError, SuiteError
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.tasks import building, catalogue, templates
from resting.benchmarks.quality.tasks import evaluator as task_bench
from resting.benchmarks.quality.tasks.likelihood import Scorer
from resting.benchmarks.quality.tasks.lm import PackedLM


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=60), min_size=1, max_size=4), st.integers(1, 100))
def test_a_subset_has_the_shares_of_the_strata(strata, items):
    chosen = building._subset(strata, items, seed=0)
    total, kinds = sum(len(of) for of in strata), sum(len(set(of)) for of in strata)
    assert sum(len(c) for c in chosen) == min(items, total)
    for of, documents in zip(strata, chosen):
        assert len(set(documents)) == len(documents)
        for stratum in set(of):
            taken = sum(of[d] == stratum for d in documents)
            size = of.count(stratum)  # rounding may cost every stratum one item, and others make up for it
            assert abs(taken - size * min(items, total) / total) <= 1 + kinds * size / total
    assert building._subset(strata, items, seed=0) == chosen


def test_subsets_differ_by_seed_and_not_otherwise():
    strata = [[0, 1] * 100]
    assert building._subset(strata, 20, 0) == building._subset(strata, 20, 0) != building._subset(strata, 20, 1)


BAD = [
    ("[tasks]\nnames = []", r"tasks.names = \[\]"),
    ('[tasks]\nnames = ["piqa", "piqa"]', "piqa stands there twice"),
    ('[tasks]\nnames = ["piqa"]\nitems = 1', "tasks.items = 1: must be greater than or equal to 3"),
    ('[tasks]\nnames = ["piqa"]\nitem = 3', "unknown key 'tasks.item'; allowed here: names, items, seed, compare"),
]


@pytest.mark.parametrize(("table", "message"), BAD)
def test_bad_tables(tmp_path, table, message):
    path = tmp_path / "a.toml"
    path.write_text(f'name = "a"\ntitle = "a"\ntargets = [0.5]\n{table}\n[[methods]]\nname = "dense"\n')
    with pytest.raises(SuiteError, match=message):
        suites.load(str(path))


def test_a_suite_measures_something(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('name = "a"\ntitle = "a"\ntargets = [0.5]\n[evaluation]\ntexts = []\n[[methods]]\nname = "dense"\n')
    with pytest.raises(SuiteError, match=r"nothing is measured; allowed with a table \[tasks\]"):
        suites.load(str(path))


def test_an_unknown_task_is_named():
    with pytest.raises(SuiteError, match="unknown task 'piqqa'; with data in a package: piqa, arc_easy"):
        building.check("piqqa")


def test_data_that_cannot_be_had_say_how_to_get_them(monkeypatch):
    def fail(config):
        raise ConnectionError("offline")

    monkeypatch.setattr(building, "_get", fail)
    with pytest.raises(AssetError, match=r"the data of truthfulqa_mc1 are in no package .*`lm_eval validate"):
        building.build("truthfulqa_mc1", 10, 0)


def fake_task(answers, choices=("no", "yes")):
    """A task of as many documents, whose right choices are given."""
    return SimpleNamespace(
        OUTPUT_TYPE="multiple_choice",
        multiple_input=0,
        eval_docs=list(range(len(answers))),
        doc_to_target=lambda d: answers[d],
        doc_to_choice=lambda d: list(choices) if isinstance(choices, tuple) else choices[d],
    )


def test_chance_is_that_of_the_best_constant_answer_too():
    task = fake_task([1, 1, 1, 0])
    assert building._chance([(task, d) for d in task.eval_docs]) == 0.75
    task = fake_task(["yes", "no", "yes", "no"])
    assert building._golds(task) == [1, 0, 1, 0]
    assert building._chance([(task, d) for d in task.eval_docs]) == 0.5
    task = fake_task([1, 1, 1], [["a", "b"], ["c", "d"], ["e", "f"]])  # nothing constant can be said
    assert building._chance([(task, d) for d in task.eval_docs]) == 0.5


def test_a_task_without_means_over_items_is_refused():
    instance = SimpleNamespace(doc_id=0, idx=0, doc={}, args=("a", "b"))
    task = SimpleNamespace(process_results=lambda document, answers: {"f1": (1, 0)})
    built = building.BuiltTask("x", "f1", [building.Part(task, [instance])], 1, 1, 0.5)
    with pytest.raises(SuiteError, match="x has no metric that is a mean over its items"):
        built.metrics([(-1.0, True)])


@memoise
def built_once(name):
    return building.build(name, 6, 0)


@pytest.mark.real
def test_every_embedded_task_builds(embedded):
    for name, data in catalogue.EMBEDDED.items():
        built = built_once(name)
        assert built.n == 6 < built.available
        assert len({i.doc_id for i in built.instances}) == 6
        assert all(i.request_type == "loglikelihood" for i in built.instances)
        assert data.headline in built.metrics([(-1.0, False)] * len(built.instances))


def test_the_small_index_has_what_the_whole_one_has():
    small, whole = building._embedded(), building._whole()
    subjects = {f"mmlu_{subject}" for subject in catalogue.mmlu_subjects()}
    assert len(subjects) == 57
    for name in (*subjects, *set(catalogue.EMBEDDED) - {catalogue.REFERENCE["task"]}):
        assert building.index_of(name) is small
        found, expected = small.task_index[name], whole.task_index[name]
        assert (found.yaml_path, found.cfg) == (expected.yaml_path, expected.cfg), name


def test_what_lm_eval_moved_is_found_and_what_it_lacks_is_named(monkeypatch):
    small = building._embedded()
    fewer = SimpleNamespace(task_index=small.task_index.keys() - {"mmlu_virology"})
    monkeypatch.setattr(building, "_embedded", lambda: fewer)
    assert building.index_of("mmlu_virology") is building._whole()
    monkeypatch.setattr(building, "_whole", lambda: fewer)
    with pytest.raises(SuiteError, match="lm-eval has no task mmlu_virology in this version"):
        building._task("mmlu_virology", catalogue.mmlu_subject("virology"))


def test_templates_are_compiled_once_and_lm_eval_is_as_before():
    from lm_eval.utils import apply_template, env

    template = "{{a}} is {{b}}"
    with templates.compiled_once(), templates.compiled_once():
        assert [apply_template(template, {"a": n, "b": -n}) for n in range(2)] == ["0 is 0", "1 is -1"]
        assert env.from_string(template) is env.from_string(template)
        assert apply_template("{{a}} was {{b}}", {"a": 1, "b": 2}) == "1 was 2"
    assert "from_string" not in vars(env)
    assert env.from_string(template) is not env.from_string(template)


@pytest.mark.real
def test_a_seed_decides_the_documents(embedded):
    assert building.build("copa", 6, 0).digest == building.build("copa", 6, 0).digest
    assert building.build("copa", 6, 0).digest != building.build("copa", 6, 1).digest


@pytest.mark.real
def test_mmlu_is_a_sample_of_all_subjects_with_five_examples(embedded):
    built = building.build("mmlu", 60, 0)
    assert built.available == 14042
    assert built.n == 60
    assert len(built.parts) > 25
    assert 0.25 <= built.chance < 0.45
    for part in built.parts:
        context, continuation = part.instances[0].args
        assert context.startswith("The following are multiple choice questions (with answers) about")
        assert context.count("\nAnswer:") == 6
        assert continuation in (" A", " B", " C", " D")


@pytest.fixture(scope="module")
def default_model(embedded):
    return embedded.load(torch.float32), embedded.tokenizer()


@pytest.mark.real
@pytest.mark.parametrize("name", ["piqa", "hellaswag", "winogrande", "lambada_openai", "boolq"])
def test_answers_are_stock_lm_eval_s_item_for_item(default_model, name):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = default_model
    built = built_once(name)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=2048)
    expected = stock.loglikelihood(built.instances, disable_tqdm=True)
    close(PackedLM(model, tokenizer, Scorer(model, 2048)).loglikelihood(built.instances, disable_tqdm=True), expected)


@pytest.mark.real
def test_a_suite_of_tasks(embedded, tmp_path, monkeypatch):
    """Rows, items and pairing of a small run; again from the cache, and the dense answers from theirs.

    The documents are real, the model is tiny: that the default model answers as stock lm-eval's is said above.
    """
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    shared = Path(embedded.folder).parent.parent
    (tmp_path / "cache").mkdir()
    for name in ("wheels", "models", "gguf"):
        if (shared / name).exists():
            (tmp_path / "cache" / name).symlink_to(shared / name)
    path = tmp_path / "small.toml"
    path.write_text("""
name = "small"
title = "small"
dtype = "bfloat16"
targets = [0.5]
[calibration]
window = 64
windows = 4
statistics_windows = 4
matching_window = 64
matching_windows = 4
[evaluation]
texts = []
[tasks]
names = ["copa"]
items = 12
compare = "float32"
[[methods]]
name = "dense"
[[methods]]
name = "teal"
""")
    suite, model = suites.load(str(path)), str(tiny.model_folder(tmp_path / "model", tiny.ENGLISH))
    (tokenizer := tiny.tokenizer(known=tiny.ENGLISH)).eos_token = "."  # lm-eval needs one
    tokenizer.save_pretrained(model)
    folder = run.run(suite, Options(tmp_path / "out", model), Console(quiet=True))
    frame = pd.read_csv(folder / "results.csv")
    items = pd.read_parquet(folder / "items.parquet")
    assert list(frame.metric) == ["copa/acc", "copa/acc_float32", "copa/acc"]
    assert (frame.n == 12).all()
    values = {m: items[(items.method == m) & (items.metric == "copa/acc")].value.to_numpy() for m in ("dense", "teal")}
    teal = frame[frame.method == "teal"].iloc[0]
    assert teal.value == pytest.approx(values["teal"].mean())
    assert teal.difference == pytest.approx((values["teal"] - values["dense"]).mean())
    assert teal.byte_sparsity == pytest.approx(0.5, abs=0.06)
    assert "## Tasks" in (folder / "README.md").read_text()
    kept = sorted((tmp_path / "cache" / "tasks").iterdir())
    assert len(kept) == 2  # in both dtypes

    def fail(*args, **kwargs):
        raise AssertionError("asked again")

    monkeypatch.setattr(task_bench.Scorer, "__call__", fail)
    again = run.run(suite, Options(tmp_path / "again", model), Console(quiet=True))
    assert (again / "results.csv").read_text() == (folder / "results.csv").read_text()
    for file in (tmp_path / "cache" / "cells").iterdir():  # cells gone, the dense answers are still there
        result = json.loads(file.read_text())
        if result["rows"][0]["method"] == "dense":
            file.unlink()
    third = run.run(suite, Options(tmp_path / "third", model), Console(quiet=True))
    assert pd.read_csv(third / "results.csv").value.tolist() == frame.value.tolist()
