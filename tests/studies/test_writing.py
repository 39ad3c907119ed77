"""What sparse models write: comparisons against plain loops, on tiny models."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from families import build
from hypothesis import given
from hypothesis import strategies as st

from resting.baselines.teal import Teal
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.studies import writing
from resting.sparsifier import AllButFirst, DecodeOnly, Plan, fingerprint

TOKENS = st.integers(0, 4)


@pytest.fixture
def prompts():
    return torch.randint(5, 97, (3, 12), generator=torch.Generator().manual_seed(0))


def test_what_is_written_is_what_generate_writes(prompts):
    model = build("llama")
    found = writing.written(model, prompts, 6)
    expected = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=6, do_sample=False)
    ended = writing.counted(found, {2})
    for row, wanted, count in zip(found, expected[:, 12:], ended):
        assert row[:count].tolist() == wanted[:count].tolist()


def test_the_likeliest_after_every_beginning_is_that_of_the_whole_model(prompts):
    model = build("llama")
    continuation = torch.randint(5, 97, (3, 7), generator=torch.Generator().manual_seed(1))
    found = writing.following(model, prompts, continuation)
    for row, prompt, text in zip(found.tolist(), prompts, continuation):
        for i, token in enumerate(row):
            with torch.no_grad():
                logits = model(torch.cat([prompt, text[:i]])[None]).logits[0, -1]
            assert token == int(logits.argmax())


@pytest.mark.parametrize("policy", [AllButFirst(1), DecodeOnly(12)], ids=str)
def test_a_plan_writes_what_it_writes_token_by_token(policy, prompts, calibration):
    """Given its own text, it takes its own tokens for the likeliest: both ways make the same tokens sparse."""
    model = build("llama")
    plan = Teal(0.5).fit(model, calibration)
    with plan.applied(model, policy):
        own = writing.written(model, prompts, 8)
        again = writing.following(model, prompts, own)
    assert torch.equal(own, again)
    assert not torch.equal(own, writing.written(model, prompts, 8))


@given(st.lists(TOKENS, min_size=1, max_size=30), st.data())
def test_comparisons_are_counts(dense, data):
    size = st.lists(TOKENS, min_size=len(dense), max_size=len(dense))
    free, forced = data.draw(size), data.draw(size)
    row = writing.compared(dense, free, forced, ends={4})
    same = 0
    while same < len(dense) and dense[same] == free[same]:
        same += 1
    assert row["same"] == same
    assert row["counted"] == len(dense)
    assert row["agreement"] * len(dense) == pytest.approx(sum(dense[i] == forced[i] for i in range(len(dense))))
    assert row["free_agreement"] >= same / len(dense)
    assert row["length"] == (free.index(4) + 1 if 4 in free else len(free))


def test_repetitions():
    assert writing.repeated([1, 2, 3]) == 0.0
    assert writing.repeated(list(range(20))) == 0.0
    assert writing.repeated([7] * 12) == pytest.approx(8 / 9)  # nine runs, one of them new
    assert writing.repeated([1, 2, 3, 4, 5, 1, 2, 3, 4]) == pytest.approx(1 / 6)


def test_the_whole_study(tmp_path, monkeypatch):
    tiny.provide_texts(monkeypatch)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(writing, "NEW", 8)
    folder = tiny.model_folder(tmp_path / "model")
    suite = tmp_path / "mine.toml"
    suite.write_text(tiny.SUITE)
    arguments = ("study", "writing", str(suite), "--model", str(folder), "--output", str(tmp_path / "out"))
    assert tiny.resting(monkeypatch, *arguments) == 0
    (found,) = (tmp_path / "out").glob("*writing")
    assert {path.name for path in found.iterdir()} >= {"README.md", "results.csv", "writing.png"}
    frame = writing.pd.read_csv(found / "results.csv")
    assert set(frame.method) == {"dense", "teal"}
    assert set(frame[frame.method == "teal"].tokens) == {"all-but-first-1", "decode-after-16"}
    assert (frame[frame.method == "dense"].agreement == 1.0).all()
    report = (found / "README.md").read_text()
    assert "| teal" in report
    assert "Again: `resting study writing mine.toml --model MODEL`." in report


def test_too_long_a_text_is_refused(monkeypatch):
    model = build("llama")
    evaluation = SimpleNamespace(window=60, texts=["wikipedia"], batch_size=2)
    loaded = SimpleNamespace(model=model, tokenizer=None, suite=SimpleNamespace(evaluation=evaluation))
    with pytest.raises(SuiteError, match=r"evaluation\.window = 60: with 8 tokens written after it .* up to 56"):
        next(writing.prompts_of(loaded, 8))


def test_a_dense_plan_agrees_with_itself(prompts):
    model = build("llama")
    plan = Plan({}, "dense", 0.0, 0.0, fingerprint.of_model(model))
    with plan.applied(model):
        own = writing.written(model, prompts, 8)
        assert torch.equal(writing.following(model, prompts, own), own)
