"""Tasks: packing against one sequence a row, answers against stock lm-eval, subsets, paired statistics, tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    Qwen2Config,
)

from baselines.teal import Teal
from benchmarks import runner
from benchmarks import suite as suites
from benchmarks.console import Console
from benchmarks.errors import AssetError, SuiteError
from benchmarks.tasks import bench as task_bench
from benchmarks.tasks import building, catalogue, statistics, tables
from benchmarks.tasks.likelihood import Scorer
from benchmarks.tasks.model import PackedLM
from benchmarks.tasks.packing import batches, packed
from sparsifier import AllButFirst, DecodeOnly, LastFraction, Meter

sequences = st.lists(
    st.lists(st.integers(3, 6), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12, unique=True
)


@settings(max_examples=200, deadline=None)
@given(sequences, st.sampled_from([0, 8, 1000]), st.sampled_from([1, 20, 500]))
def test_every_sequence_can_be_read_from_its_row(given, longest, tokens):
    packs = packed(given, longest)
    found = {}
    for batch in batches(packs, tokens):
        for row, places in enumerate(batch.places):
            for number, at in places.items():
                found[number] = tuple(batch.ids[row, at].tolist())
                assert batch.positions[row, at].tolist() == list(range(len(at)))
                assert not set(batch.branch[row, at].tolist()) - {0, max(batch.branch[row, at].tolist())}
        assert len(batch.ids) == 1 or batch.ids.numel() <= tokens
    assert found == dict(enumerate(given))
    total = sum(pack.length for pack in packs)
    assert total <= sum(len(s) for s in given)
    if longest == 0:
        assert total == sum(len(s) for s in given)


def test_choices_of_one_question_share_it():
    question = tuple(range(10, 30))
    packs = packed([(*question, 1, 2), (*question, 3), (*question, 4, 5, 6)], 100)
    assert [(pack.prefix, sorted(pack.branches)) for pack in packs] == [(question, [(1, 2), (3,), (4, 5, 6)])]


def requests(n=24, seed=0):
    """Groups of three continuations of one context, one of them a prefix of another."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n // 3):
        context = torch.randint(3, 97, (int(torch.randint(2, 12, (), generator=g)),), generator=g).tolist()
        tail = torch.randint(3, 97, (4,), generator=g).tolist()
        made += [(context, tail[:1]), (context, tail), (context, tail[:2][::-1])]
    return made


def by_hand(model, asked, context):
    """One forward a request, all its logits."""
    answers = []
    for before, continuation in asked:
        tokens = [*before, *continuation][-(context + 1) :]
        with torch.no_grad():
            log_q = model(torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(-1)[-len(continuation) :]
        nats = sum(float(log_q[i, token]) for i, token in enumerate(continuation))
        answers.append((nats, log_q.argmax(-1).tolist() == continuation))
    return answers


def close(found, expected):
    assert [g for _, g in found] == [g for _, g in expected]
    np.testing.assert_allclose([n for n, _ in found], [n for n, _ in expected], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("may_pack", [True, False])
def test_likelihoods_are_those_of_single_forwards(llama, may_pack):
    asked = requests()
    close(Scorer(llama, 64, may_pack)(asked), by_hand(llama, asked, 64))


@pytest.mark.parametrize("tokens", [AllButFirst(1), AllButFirst(3), DecodeOnly(4), LastFraction(0.5)])
def test_a_sparse_model_answers_as_one_sequence_at_a_time(llama, calibration, tokens):
    asked = requests()
    plan = Teal(0.5).fit(llama, calibration)
    may_pack = not isinstance(tokens, LastFraction)
    with plan.applied(llama, tokens):
        close(Scorer(llama, 64, may_pack)(asked), by_hand(llama, asked, 64))


def left_unread(model, plan, sequences, scorer=None):
    """Sparse tokens, and the sum over them of the share that they leave unread."""
    meter = Meter()
    with plan.applied(model, AllButFirst(1), meter), torch.no_grad():
        if scorer:
            scorer(sequences)
        else:
            for sequence in sequences:
                model(torch.tensor([sequence]))
    return meter.tokens, meter.tokens * meter.byte_sparsity()


def test_packed_rows_leave_unread_what_their_tokens_do(llama, calibration):
    """Those of both sequences, less those of the prefix, which runs once."""
    plan = Teal(0.5).fit(llama, calibration)
    prefix, tails = [5, 6, 7, 8, 9, 10], ([11, 12, 13], [14, 15, 16, 17])
    found = left_unread(llama, plan, [(prefix, tail) for tail in tails], Scorer(llama, 64))
    whole = [left_unread(llama, plan, [[*prefix, *tail[:-1]]]) for tail in tails]
    shared = left_unread(llama, plan, [prefix])
    assert found[0] == whole[0][0] + whole[1][0] - shared[0]
    assert found[1] == pytest.approx(whole[0][1] + whole[1][1] - shared[1], rel=1e-6)


def test_packed_tokens_are_counted_once_and_padding_never(llama, calibration):
    asked = [([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [10, 11]), ([20, 21], [22])]
    plan, meter = Teal(0.5).fit(llama, calibration), Meter()
    scorer = Scorer(llama, 64)
    with plan.applied(llama, AllButFirst(1), meter):
        scorer(asked)
    # Inputs: 5 6 7 8, the same and 10, 20 21: four and one packed, two.
    assert scorer.cost.tokens == 7
    assert meter.tokens == 5


def test_one_forward_for_choices_of_one_token(llama):
    asked = [([5, 6, 7], [token]) for token in (10, 11, 12, 13)]
    scorer = Scorer(llama, 64)
    close(scorer(asked), by_hand(llama, asked, 64))
    assert scorer.cost.tokens == 3


def test_what_is_too_long_loses_its_beginning(llama):
    asked = [(list(range(3, 90)), [91, 92]), ([5], [6])]
    scorer = Scorer(llama, 32)
    close(scorer(asked), by_hand(llama, asked, 32))
    assert scorer.cost.truncated == 1


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        (MistralConfig(**SMALL, sliding_window=6), True),
        (MistralConfig(**SMALL, sliding_window=None), False),
        (Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6), True),
        (Qwen2Config(**SMALL), False),
    ],
)
def test_a_sliding_window_is_not_packed(config, slides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert task_bench.has_sliding_window(model) is slides
    asked = requests(9)
    close(Scorer(model, 64, may_pack=not slides)(asked), by_hand(model, asked, 64))


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


def test_the_mean_and_its_interval():
    random = np.random.default_rng(1)
    items = [random.normal(0.3, 1.0, 400), random.normal(0.5, 1.0, 400)]
    found = statistics.mean(items)
    assert found.value == pytest.approx(np.mean([i.mean() for i in items]))
    half = 1.96 * math.sqrt(sum(i.var() / 400 for i in items)) / 2
    assert found.low == pytest.approx(found.value - half, abs=0.01)
    assert found.high == pytest.approx(found.value + half, abs=0.01)
    assert not found.holds_zero
    assert statistics.mean([np.zeros(2)]).holds_zero  # too few to say


def test_a_paired_difference_is_narrower_than_that_of_two_means():
    random = np.random.default_rng(2)
    dense = random.integers(0, 2, 500).astype(float)
    sparse = np.where(random.random(500) < 0.02, 1 - dense, dense)
    gap = statistics.difference(sparse, dense)
    assert gap.value == pytest.approx(sparse.mean() - dense.mean())
    assert gap.high - gap.low < 0.04
    assert statistics.difference(dense, dense).holds_zero


@pytest.mark.parametrize(("right", "above"), [(130, True), (105, False), (70, False)])
def test_chance(right, above):
    assert statistics.is_above_chance([1.0] * right + [0.0] * (200 - right), 0.5) is above


def test_perplexities_of_items():
    value, _ = task_bench.summary("perplexity", [-1.0, -3.0])
    assert value == pytest.approx(math.exp(2.0))
    gap = task_bench.paired("perplexity", [-2.0, -4.0, -6.0], [-1.0, -3.0, -5.0])
    assert gap.value == pytest.approx(1.0)
    assert task_bench.summary("acc", [1.0, 0.0])[0] == 0.5


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


def frame_and_items():
    """Two tasks, one at chance; dense and a method that lost one item of four."""
    right = {"dense": [1, 1, 1, 0] * 25, "teal": [1, 1, 0, 0] * 25}
    rows, items = [], []
    for task, near in (("piqa", False), ("boolq", True)):
        for method, values in right.items():
            target = 0.0 if method == "dense" else 0.5
            shown = [1, 0] * 50 if near else values
            at = {"method": method, "target_sparsity": target, "seed": 0, "metric": f"{task}/acc"}
            rows.append(at | {"text": task, "n": 100, "value": np.mean(shown), "byte_sparsity": target})
            items += [at | {"item": i, "value": float(v)} for i, v in enumerate(shown)]
    return pd.DataFrame(rows), pd.DataFrame(items)


def test_tables_mark_chance_and_noise(tmp_path):
    frame, items = frame_and_items()
    about = {t: {"headline": "acc", "chance": 0.5, "available": 1000} for t in ("piqa", "boolq")}
    cells = [{"method": "dense", "tasks": about}]
    text = "\n".join(tables.sections(frame, items, cells, "x", tmp_path, ""))
    assert "piqa 100 of 1000" in text
    assert "boolq (50 %)" in text
    line = next(line for line in text.splitlines() if line.startswith("| teal"))
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        *("teal", "50.0 (-25.0)", "50.0 (-12.5)", "50.0 (-25.0)", "50.0 (+0.0 ≈)")
    ]
    assert (tmp_path / "tasks.png").stat().st_size > 1000
    assert (tmp_path / "tasks.svg").exists()


@pytest.mark.real
def test_every_embedded_task_builds(embedded):
    for name, data in catalogue.EMBEDDED.items():
        built = building.build(name, 6, 0)
        assert built.n == 6 < built.available
        assert len({i.doc_id for i in built.instances}) == 6
        assert all(i.request_type == "loglikelihood" for i in built.instances)
        assert data.headline in built.metrics([(-1.0, False)] * len(built.instances))


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


@pytest.mark.real
@pytest.mark.parametrize("name", ["piqa", "hellaswag", "winogrande", "lambada_openai", "boolq"])
def test_answers_are_stock_lm_eval_s_item_for_item(embedded, name):
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = embedded.load(torch.float32), embedded.tokenizer()
    built = building.build(name, 6, 0)
    stock = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=2048)
    expected = stock.loglikelihood(built.instances, disable_tqdm=True)
    close(PackedLM(model, tokenizer, Scorer(model, 2048)).loglikelihood(built.instances, disable_tqdm=True), expected)


@pytest.mark.real
def test_a_suite_of_tasks(embedded, tmp_path, monkeypatch):
    """Rows, items and pairing of a small run; again from the cache, and the dense answers from theirs."""
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
    suite = suites.load(str(path))
    folder = runner.run(suite, runner.Options(tmp_path / "out"), Console(quiet=True))
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
    again = runner.run(suite, runner.Options(tmp_path / "again"), Console(quiet=True))
    assert (again / "results.csv").read_text() == (folder / "results.csv").read_text()
    for file in (tmp_path / "cache" / "cells").iterdir():  # cells gone, the dense answers are still there
        result = json.loads(file.read_text())
        if result["rows"][0]["method"] == "dense":
            file.unlink()
    third = runner.run(suite, runner.Options(tmp_path / "third"), Console(quiet=True))
    assert pd.read_csv(third / "results.csv").value.tolist() == frame.value.tolist()
