"""`resting generate`: the text is that of the definition, and figures are those counted by hand."""

from __future__ import annotations

import math
import re

import pytest
import tiny
import torch
import using
from using import PROMPT

from resting.benchmarks.using import comparing, generating
from resting.benchmarks.using.generating import Written
from resting.sparsifier import Plan, Rule, Site, fingerprint

BLOCK = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
"""Weights of a tiny block's matrices: q and o, k and v, gate, up and down."""


def expected(prompt: str, steps: int) -> tuple[str, str]:
    """What the dense model and the one under the plan write, by the definition."""
    model, plan, tokenizer = using.model(using.room() / "model"), using.plan(), tiny.tokenizer()
    ids = tokenizer(prompt).input_ids
    dense = using.greedy(model, ids, steps)
    with plan.applied(model):
        sparse = using.greedy(model, ids, steps)
    return tokenizer.decode(dense), tokenizer.decode(sparse)


def test_the_text_is_that_of_the_definition(room, monkeypatch, capsys):
    dense, sparse = expected(PROMPT, 20)
    assert dense != sparse
    assert tiny.resting(monkeypatch, "generate", "--plan", "plan", "--prompt", PROMPT, "--max-new-tokens", "20") == 0
    out, err = capsys.readouterr()
    assert out.strip() == sparse
    number = len(tiny.tokenizer()(sparse).input_ids)
    assert re.search(rf"{number} tokens, [\d.]+ a second: model under mean-error\(teal\) at 0.5, float32 on cpu", err)


def test_compare_shows_both(room, monkeypatch, capsys):
    dense, sparse = expected(PROMPT, 20)
    arguments = ("--plan", "plan", "--model", "model", "--prompt", PROMPT, "--max-new-tokens", "20", "--threads", "1")
    assert tiny.resting(monkeypatch, "generate", *arguments, "--compare") == 0
    out = capsys.readouterr().out
    assert out.startswith(f"dense (model):\n{dense}\n\nsparse (mean-error(teal) at 0.5):\n{sparse}\n")
    rows = {
        line.split()[0]: line.split()[1:] for line in out.splitlines() if re.match(r"(dense|sparse) +[\d.]+ ", line)
    }
    speeds = {name: float(values[0]) for name, values in rows.items()}
    milliseconds = {name: float(values[1]) for name, values in rows.items()}
    assert all(speed * milliseconds[name] == pytest.approx(1000, rel=0.05) for name, speed in speeds.items())
    times, read, unread = map(
        float, re.search(r"([\d.]+) times as fast .* ([\d.]+) of the bytes: ([\d.]+) of those", out).groups()
    )
    assert times == pytest.approx(speeds["sparse"] / speeds["dense"], rel=0.05)
    assert unread == pytest.approx(0.5, abs=0.1)
    head_and_norms = 32 * 97 + 7 * 32
    assert read == pytest.approx(1 - unread * 3 * BLOCK / (3 * BLOCK + head_and_norms), abs=0.002)


def test_bytes_are_those_counted_by_hand():
    """All of q rests in one block, and a bias is read in another."""
    model = using.model(using.room() / "model")
    rules = {Site(0, "q"): Rule(threshold=math.inf), Site(1, "down"): Rule(bias=torch.ones(32))}
    plan = Plan(rules, "x", 0.1, 0.1, fingerprint.of_model(model))
    written = Written(torch.arange(3, 15)[None], 4, [])
    read = comparing.measured(model, plan, written)
    assert read.dense == 4 * (3 * BLOCK + 32 * 97 + 7 * 32)
    assert read.blocks == 4 * 3 * BLOCK
    assert read.sparse == pytest.approx(read.dense - 4 * (32 * 32 - 32))


def test_bytes_are_those_of_decoded_tokens_after_a_sparse_prompt():
    """Each step by itself, from the whole text: the kept inputs of one layer, counted at its last token."""
    model = using.model(using.room() / "model")
    site, ids = Site(1, "up"), torch.arange(3, 23)[None]
    plan = Plan({site: Rule(threshold=0.8)}, "x", 0.1, 0.1, fingerprint.of_model(model))
    seen = []
    with plan.applied(model) as layers, torch.no_grad():
        hook = layers[site].register_forward_pre_hook(lambda m, args: seen.append(args[0][0, -1]))
        for end in range(9, 20):  # the input of a step is the token before the one it gives
            model(ids[:, :end])
        hook.remove()
    share = torch.stack(seen).abs().le(0.8).double().mean().item()
    assert 0.1 < share < 0.9
    found = comparing.measured(model, plan, Written(ids, 8, []))
    assert found.sparsity == pytest.approx(share * 32 * 48 / (3 * BLOCK), rel=1e-6)


def test_nothing_decoded_has_no_bytes():
    model, plan = using.model(using.room() / "model"), using.plan()
    assert comparing.measured(model, plan, Written(torch.ones(1, 5).long(), 4, [0.0])).sparse is None


def test_the_first_tokens_are_not_timed():
    def per_token(*times: float) -> float | None:
        return Written(torch.ones(1, 1), 0, [*times]).per_token

    assert per_token(0, 10, 20, 30, 31, 33, 35) == 2
    assert per_token(0, 10, 20, 30, 31) is None
    assert per_token() is None


def test_what_cannot_be_timed_is_said(room, monkeypatch, capsys):
    arguments = ("--plan", "plan", "--prompt", PROMPT, "--max-new-tokens", "1", "--compare")
    assert tiny.resting(monkeypatch, "generate", *arguments) == 0
    out = capsys.readouterr().out
    assert "Not timed: dense and sparse, with fewer than 6 tokens." in out
    assert "times as fast" not in out
    assert re.search(r"^sparse +- +- +-$", out, re.MULTILINE)


def test_a_seed_decides_what_is_sampled(room, monkeypatch, capsys):
    def text(*more: str) -> str:
        arguments = ("--plan", "plan", "--prompt", PROMPT, "--max-new-tokens", "12", "--temperature", "1.5", *more)
        assert tiny.resting(monkeypatch, "generate", *arguments) == 0
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")


def test_chat_puts_the_prompt_into_the_template():
    model, tokenizer = using.model(using.room() / "model"), tiny.tokenizer()
    tokenizer.chat_template = "w80 {% for m in messages %}{{ m.content }}{% endfor %} w81"
    ids = generating.encode(model, tokenizer, PROMPT, True, 8)
    assert tokenizer.decode(ids[0]) == f"w80 {PROMPT} w81"


def test_the_model_comes_back_after_text_was_written(room):
    from resting.sparsifier.decoding import decoding

    model, plan, tokenizer = using.model(room / "model"), using.plan(), tiny.tokenizer()
    ids = generating.encode(model, tokenizer, PROMPT, False, 8)
    with torch.no_grad():
        before = model(ids).logits
        with decoding(plan, model):
            generating.write(model, tokenizer, ids, generating.Setting(8))
        assert torch.equal(model(ids).logits, before)
