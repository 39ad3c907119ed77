"""Masks that depend on the token, rescaled inputs and replaced weights, against what their formulas say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from resting.sparsifier import (
    ACT,
    AllButFirst,
    MaskFunction,
    Meter,
    Plan,
    PlanError,
    Rule,
    Site,
    fingerprint,
    mask_function,
    masked,
    register,
)
from resting.sparsifier.statistics.levels import Levels

RANDOM = torch.Generator().manual_seed(7)
TOKENS = torch.randn(40, 24, generator=RANDOM) * torch.rand(40, 1, generator=RANDOM).exp()


def plan_of(model, rules):
    return Plan(rules, "test", 0.5, 0.5, fingerprint.of_model(model))


def logits(model, ids, **more):
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def kept_by_hand(x: torch.Tensor, mask: str, p: float) -> list[bool]:
    """Which channels of one token are kept, number by number."""
    sizes = [abs(float(v)) for v in x.double()]
    if mask == "max-p":
        return [size >= p * max(sizes) for size in sizes]
    if mask == "statistical":
        mean = sum(sizes) / len(sizes)
        spread = math.sqrt(sum((size - mean) ** 2 for size in sizes) / len(sizes))
        return [size > mean + p * spread for size in sizes]
    kept, total = [False] * len(sizes), 0.0
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        if total >= p * sum(sizes):
            break
        kept[i], total = True, total + sizes[i]
    return kept


@pytest.mark.parametrize(
    ("mask", "values"),
    [("top-p", (0.0, 0.3, 0.75, 0.95)), ("max-p", (0.1, 0.33, 0.9)), ("statistical", (-1.5, -0.2, 0.0, 1.1))],
)
def test_masks_are_their_formulas(mask, values):
    for p in values:
        wanted = torch.tensor([kept_by_hand(x, mask, p) for x in TOKENS])
        assert torch.equal(masked(TOKENS, Rule(threshold=p, mask=mask)), TOKENS * wanted)
        assert 0 < int(wanted.sum()) < wanted.numel() or p == 0.0


@pytest.mark.parametrize(("mask", "neutral"), [("top-p", 1.0), ("max-p", 0.0), ("statistical", -math.inf)])
def test_a_neutral_threshold_is_dense_bit_for_bit(llama, ids, mask, neutral):
    rule = Rule(threshold=neutral, mask=mask)
    assert rule.masks_nothing
    assert masked(TOKENS, rule) is TOKENS
    with plan_of(llama, {Site(0, "q"): rule, Site(1, "down"): rule}).applied(llama, AllButFirst(0)):
        sparse = logits(llama, ids)
    assert torch.equal(sparse, logits(llama, ids))


@pytest.mark.parametrize("mask", ["top-p", "max-p", "statistical"])
def test_a_scale_weighs_and_a_shift_is_taken_off_first(mask):
    scale, shift = torch.rand(24, generator=RANDOM) + 0.5, torch.randn(24, generator=RANDOM) / 4
    by_hand = torch.tensor([kept_by_hand(x, mask, 0.6) for x in (TOKENS - shift) * scale])
    rule = Rule(threshold=0.6, mask=mask, scale=scale, shift=shift)
    assert torch.equal(masked(TOKENS, rule), (TOKENS - shift) * by_hand)


@pytest.mark.parametrize("mask", ["top-p", "max-p", "statistical"])
def test_a_token_of_zeros_stays_and_what_is_not_a_number_passes(mask):
    rule = Rule(threshold=0.5, mask=mask)
    assert not masked(torch.zeros(3, 8), rule).any()
    broken = torch.tensor([[1.0, float("nan"), 0.1, -3.0]])
    assert masked(broken, rule).isnan().any()
    infinite = torch.tensor([[1.0, float("inf"), 0.1, -3.0]])
    assert not torch.isfinite(masked(infinite, rule)).all()


@pytest.mark.parametrize("mask", ["threshold", "top-p", "max-p", "statistical"])
def test_levels_give_the_threshold_at_which_a_share_rests(mask):
    x = torch.randn(400, 64, generator=RANDOM) * torch.rand(400, 1, generator=RANDOM).exp()
    levels = Levels(mask_function(mask))
    for part in x.split(150):
        levels.add(part.abs())
    for ratio in (0.1, 0.35, 0.5, 0.8):
        kept = masked(x, Rule(threshold=levels.quantile(ratio), mask=mask))
        assert float((kept == 0).float().mean()) == pytest.approx(ratio, abs=0.01)
    assert levels.quantile(0.0) == mask_function(mask).neutral
    assert Levels.together([levels, levels]).quantile(0.5) == pytest.approx(levels.quantile(0.5), abs=1e-6)


def test_statistical_is_top_k_where_tokens_are_alike():
    x = torch.stack([torch.randn(64, generator=RANDOM)[torch.randperm(64, generator=RANDOM)] for _ in range(1)])
    alike = torch.cat([x[:, torch.randperm(64, generator=RANDOM)] for _ in range(20)])
    levels = Levels(mask_function("statistical"))
    levels.add(alike.abs())
    found = masked(alike, Rule(threshold=levels.quantile(0.5), mask="statistical"))
    assert torch.equal(found, masked(alike, Rule(topk=32)))


def test_the_kept_input_has_the_variance_of_the_token():
    for rule in (
        Rule(threshold=0.7, rescale=True),
        Rule(topk=5, rescale=True, shift=0.2),
        Rule(0.6, mask="top-p", rescale=True),
    ):
        kept, before = masked(TOKENS, rule), TOKENS - rule.shift
        plain = masked(TOKENS, Rule(rule.threshold, shift=rule.shift, topk=rule.topk, mask=rule.mask))
        some = plain.var(-1, correction=0) > 0
        assert torch.equal(kept != 0, plain != 0)
        torch.testing.assert_close(kept.var(-1, correction=0)[some], before.var(-1, correction=0)[some])
        factor = before.double().var(-1) / plain.double().var(-1)
        torch.testing.assert_close(
            kept[some].double(), (plain.double() * factor.sqrt()[:, None])[some], rtol=1e-5, atol=0
        )


def test_without_a_variance_nothing_is_rescaled():
    alike, all_rest = torch.full((1, 8), 2.0), torch.full((1, 8), 0.1)
    rule = Rule(threshold=1.0, rescale=True)
    assert torch.equal(masked(alike, rule), alike)
    assert not masked(all_rest, rule).any()
    x = torch.randn(1, 8, requires_grad=True)
    masked(x * 1e-3, rule).sum().backward()
    assert torch.isfinite(x.grad).all()


def test_replaced_weights_are_those_of_sparse_tokens(llama, ids):
    other, bias = torch.randn(32, 48, generator=RANDOM), torch.randn(32, generator=RANDOM)
    rule, down = Rule(threshold=0.05, weight=other, bias=bias), llama.model.layers[1].mlp.down_proj
    x = torch.randn(2, 16, 48, generator=RANDOM)
    sparse = (x * (x.abs() > 0.05)).double() @ other.double().T + bias.double()
    dense = x.double() @ down.weight.double().T
    pad = torch.ones(2, 16, dtype=torch.long)
    pad[0, :4] = 0
    for policy, mask, first in (
        (AllButFirst(3), None, [3, 3]),
        (AllButFirst(1), pad, [5, 1]),
        (AllButFirst(16), None, [16, 16]),
    ):
        with plan_of(llama, {Site(1, "down"): rule}).applied(llama, policy), torch.no_grad():
            llama(input_ids=ids, attention_mask=mask)
            found = llama.model.layers[1].mlp.down_proj(x).double()
        for row, at in enumerate(first):
            torch.testing.assert_close(found[row, at:], sparse[row, at:], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[row, :at], dense[row, :at], rtol=1e-5, atol=1e-5)


def test_what_replaces_weights_or_rescales_reads_no_more(llama, ids):
    measured = []
    for more in ({}, {"weight": torch.randn(32, 48, generator=RANDOM)}, {"rescale": True}):
        meter = Meter()
        with plan_of(llama, {Site(2, "down"): Rule(threshold=0.1, **more)}).applied(llama, meter=meter):
            logits(llama, ids)
        measured.append(meter.byte_sparsity())
    assert measured[0] > 0
    assert measured[1:] == measured[:1] * 2


def test_every_new_field_survives_a_save(llama, ids, tmp_path):
    rules = {
        Site(0, "q"): Rule(threshold=0.8, mask="top-p", scale=torch.rand(32, generator=RANDOM)),
        Site(0, "o"): Rule(threshold=-0.3, mask="statistical", rescale=True),
        Site(1, "down"): Rule(threshold=0.1, rescale=True, weight=torch.randn(32, 48, generator=RANDOM)),
    }
    plan = plan_of(llama, rules)
    with plan.applied(llama):
        wanted = logits(llama, ids)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    for site, rule in rules.items():
        again = loaded.rules[site]
        assert (again.threshold, again.mask, again.rescale) == (rule.threshold, rule.mask, rule.rescale)
        assert rule.same_mask(again)
    assert torch.equal(loaded.rules[Site(1, "down")].weight, rules[Site(1, "down")].weight)
    with loaded.applied(llama):
        assert torch.equal(logits(llama, ids), wanted)


def test_a_function_of_a_plug_in_is_registered_and_an_unknown_one_refused(llama, tmp_path):
    register(MaskFunction("odd-one-out", lambda score: score - score.mean(-1, keepdim=True), least=-math.inf))
    plan = plan_of(llama, {Site(0, "q"): Rule(threshold=0.5, mask="odd-one-out")})
    x = torch.tensor([[0.0, 1.0, 5.0]])
    assert masked(x, plan.rules[Site(0, "q")]).tolist() == [[0.0, 0.0, 5.0]]
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").rules[Site(0, "q")].mask == "odd-one-out"
    file = tmp_path / "plan" / "rules.safetensors"
    save_file(load_file(file) | {"0.q/mask": torch.tensor(list(b"nobody-s")).byte()}, file)
    with pytest.raises(
        PlanError, match=r"at 0\.q, mask must be one of threshold, top-p, max-p, statistical, .*'nobody-s'"
    ):
        Plan.load(tmp_path / "plan")
    with pytest.raises(PlanError, match="already"):
        register(MaskFunction("top-p", lambda score: score))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask": "none"}, "mask must be one of .*got 'none'"),
        ({"mask": "top-p", "threshold": 1.5}, r"'top-p' must be in \[0, 1\], got 1.5"),
        ({"mask": "max-p", "threshold": float("nan")}, "got nan"),
        ({"mask": "top-p", "threshold": torch.ones(3)}, "one number as its threshold"),
        ({"mask": "max-p", "topk": 3}, "no topk, got topk 3"),
        ({"rescale": 2}, "rescale must be True or False, got 2"),
        ({"weight": torch.ones(3)}, r"weight must be \[out, in\]"),
        ({"weight": torch.ones(2, 3), "low_rank": (torch.ones(2, 1), torch.ones(1, 3))}, "without a low_rank"),
        ({"weight": torch.full((2, 3), float("inf"))}, "weight must be finite"),
        ({"threshold": -0.5}, "at least 0"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(PlanError, match=message):
        Rule(**fields)


def test_what_a_plan_cannot_hold_is_refused_by_name(llama):
    for site, rule, message in (
        (
            Site(0, "down"),
            Rule(weight=torch.ones(32, 47)),
            r"weight at 0.down is \[32, 47\], the model needs \[32, 48\]",
        ),
        (Site(0, ACT), Rule(threshold=0.1, rescale=True), "0.act masks an activation: .*no rescale"),
        (Site(0, ACT), Rule(weight=torch.ones(32, 48)), "0.act masks an activation: .*no weight"),
    ):
        with pytest.raises(PlanError, match=message):
            plan_of(llama, {site: rule}).check(llama)
    plan = plan_of(llama, {Site(0, "down"): Rule(weight=torch.ones(32, 48))})
    with (
        pytest.raises(PlanError, match=r"replaces the weights at 0\.down: such a plan cannot be folded"),
        plan.folded(llama),
    ):
        pass


def test_the_activated_gate_takes_a_mask_function(llama, ids):
    meter, kept = Meter(), []

    class TopP(torch.nn.Module):
        def forward(self, z):
            v = F.silu(z)
            keep = torch.tensor([[kept_by_hand(x, "top-p", 0.8) for x in row] for row in v])
            keep[:, 0] = True
            kept.append(keep[:, 1:].double().mean())
            return v * keep

    with plan_of(llama, {Site(0, ACT): Rule(threshold=0.8, mask="top-p")}).applied(llama, meter=meter):
        actual = logits(llama, ids)
    llama.model.layers[0].mlp.act_fn = TopP()
    torch.testing.assert_close(actual, logits(llama, ids))
    assert meter.site_sparsity()[Site(0, "down")] == pytest.approx(1.0 - float(kept[0]), abs=1e-6)


def test_the_plan_s_card_counts_them(llama):
    from resting.sparsifier import card

    rules = {Site(0, "q"): Rule(0.1, rescale=True), Site(0, "down"): Rule(weight=torch.ones(32, 48))}
    found = card.counts(rules)
    assert found["rescaled inputs"] == found["replaced weights"] == "1"
    assert json.dumps(found)


def test_a_shift_of_the_activated_gate_is_refused(llama):
    """Decode kernels would leave it out, and nothing gives it back."""
    plan = plan_of(llama, {Site(0, ACT): Rule(threshold=0.1, shift=0.05)})
    with pytest.raises(PlanError, match="takes no bias, no low_rank, no weight, no shift and no rescale"):
        plan.check(llama)
