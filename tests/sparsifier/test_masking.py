"""Masked execution against oracles written from the formulas."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from families import FAMILIES, build
from hypothesis import given, settings
from hypothesis import strategies as st

from resting.baselines.dense import Dense
from resting.baselines.teal import Teal
from resting.sparsifier import (
    ACT,
    AllButFirst,
    DecodeOnly,
    Decoder,
    LastFraction,
    Meter,
    Plan,
    PlanError,
    Rule,
    Site,
    UnsupportedModelError,
    fingerprint,
)
from resting.sparsifier.masking import kept_input


def plan_of(model, rules):
    return Plan(rules, "test", 0.5, 0.5, fingerprint.of_model(model))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_teal_equals_a_direct_implementation(family, ids, calibration):
    model = build(family)
    plan = Teal(target=0.5).fit(model, calibration)
    thresholds = {(site.block, site.role): rule.threshold for site, rule in plan.rules.items()}
    expected = oracle.hooked(model, ids, oracle.magnitude(thresholds))
    with plan.applied(model):
        actual = logits(model, ids)
    assert torch.equal(actual, expected)
    assert not torch.equal(actual, logits(model, ids))


def test_byte_sparsity_equals_a_hand_count(llama, ids, calibration):
    plan = Teal(target=0.4).fit(llama, calibration)
    thresholds = {(site.block, site.role): rule.threshold for site, rule in plan.rules.items()}
    unread = total = 0

    def count(key, x):
        nonlocal unread, total
        weight = oracle.linears(llama)[key].weight
        out = oracle.magnitude(thresholds)(key, x)
        unread += int((out[:, 1:] == 0).sum()) * weight.shape[0]
        total += out[:, 1:].numel() * weight.shape[0]
        return out

    oracle.hooked(llama, ids, count)
    meter = Meter()
    with plan.applied(llama, meter=meter):
        logits(llama, ids)
    assert meter.byte_sparsity() == pytest.approx(unread / total, abs=1e-6)
    assert meter.tokens == 2 * 15


def test_biases_and_factors_count_as_read(llama, ids):
    weights = sum(m.weight.numel() for m in oracle.linears(llama).values())
    rule = Rule(bias=torch.ones(32), low_rank=(torch.zeros(32, 2), torch.zeros(2, 48)))
    meter = Meter()
    with plan_of(llama, {Site(0, "down"): rule}).applied(llama, meter=meter):
        logits(llama, ids)
    assert meter.byte_sparsity() == pytest.approx(-(32 + 32 * 2 + 2 * 48) / weights)


@pytest.mark.parametrize("sparsifier", [Dense(), Teal(target=0.0)])
def test_zero_sparsity_is_dense_bit_for_bit(model, ids, calibration, sparsifier):
    plan = sparsifier.fit(model, calibration)
    meter = Meter()
    with plan.applied(model, AllButFirst(0), meter):
        assert torch.equal(logits(model, ids), before := logits(model, ids))
    assert torch.equal(before, logits(model, ids))
    assert meter.byte_sparsity() == 0.0


def test_every_field_of_a_rule(llama, ids):
    g = torch.Generator().manual_seed(3)
    scale, shift = torch.rand(48, generator=g) + 0.5, 0.02 * torch.randn(48, generator=g)
    bias = torch.randn(32, generator=g)
    u, v = 0.1 * torch.randn(32, 3, generator=g), 0.1 * torch.randn(3, 48, generator=g)
    rule = Rule(threshold=0.05, scale=scale, shift=shift, bias=bias, low_rank=(u, v))
    down = llama.model.layers[1].mlp.down_proj
    x = torch.randn(2, 16, 48, generator=g)
    keep = (scale * (x - shift)).abs() > 0.05
    expected = (
        ((x - shift) * keep).double() @ (down.weight.double() - u.double() @ v.double()).T
        + x.double() @ v.double().T @ u.double().T
        + bias.double()
    )
    seen = {}
    with plan_of(llama, {Site(1, "down"): rule}).applied(llama, AllButFirst(3)), torch.no_grad():
        logits(llama, ids)  # sets the token selection
        layer = llama.model.layers[1].mlp.down_proj
        seen = layer(x)
    torch.testing.assert_close(seen[:, 3:].double(), expected[:, 3:], rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[:, :3], down(x)[:, :3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@settings(max_examples=60, deadline=None)
@given(threshold=st.floats(0, 4), seed=st.integers(0, 1000))
def test_comparing_in_a_short_dtype_is_comparing_in_fp32(dtype, threshold, seed):
    x = torch.randn(257, generator=torch.Generator().manual_seed(seed)).to(dtype)
    exact = x.float().abs() > torch.tensor(threshold, dtype=torch.float32)
    kept = kept_input(x, Rule(threshold=threshold).cutoff(dtype))
    assert torch.equal(kept, x * exact)
    vector = kept_input(x, Rule(threshold=torch.full((257,), threshold)).cutoff(dtype))
    assert torch.equal(vector, kept)


def test_nan_and_infinity_pass():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.1])
    for cutoff in (0.5, torch.full((4,), 0.5)):
        kept = kept_input(x, cutoff)
        assert kept[0].isnan()
        assert kept[1:].tolist() == [float("inf"), -float("inf"), 0.0]


@settings(max_examples=20, deadline=None)
@given(low=st.floats(0, 0.9), step=st.floats(0, 0.09), seed=st.integers(0, 20))
def test_sparsity_is_monotone_in_the_threshold(low, step, seed):
    x = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
    a, b = (int((kept_input(x, t) == 0).sum()) for t in (low, low + step))
    assert a <= b


def test_act_mask_rests_rows_of_up_and_columns_of_down(llama, ids):
    """CATS, by hand: y = W_down (up * v * m), v = SiLU(gate)."""
    threshold = 0.05
    rules = {Site(i, ACT): Rule(threshold=threshold) for i in range(3)}
    meter = Meter()
    with plan_of(llama, rules).applied(llama, meter=meter):
        actual = logits(llama, ids)
    kept = []

    class Cats(torch.nn.Module):
        def forward(self, z):
            v = torch.nn.functional.silu(z)
            m = v.abs() > threshold
            m[:, 0] = True
            kept.append(m[:, 1:].double().mean())
            return v * m

    for layer in llama.model.layers:
        layer.mlp.act_fn = Cats()
    assert torch.equal(actual, logits(llama, ids))
    sizes = {role: oracle.linears(llama)[0, role].weight.numel() for role in oracle.LEAVES.values()}
    rest = 1 - float(torch.stack(kept).mean())
    expected = rest * (sizes["up"] + sizes["down"]) / sum(sizes.values())
    assert meter.byte_sparsity() == pytest.approx(expected, abs=1e-9)


def test_act_and_input_masks_together_count_each_weight_once(llama, ids):
    act, up = Rule(threshold=0.05), Rule(threshold=0.5)
    meter = Meter()
    with plan_of(llama, {Site(0, ACT): act, Site(0, "up"): up}).applied(llama, AllButFirst(0), meter):
        seen = {}
        mlp = llama.model.layers[0].mlp
        handle = mlp.register_forward_pre_hook(lambda m, a: seen.update(x=a[0]))
        logits(llama, ids)
        handle.remove()
    with torch.no_grad():
        rows = (torch.nn.functional.silu(mlp.gate_proj(seen["x"])).abs() > 0.05).double().mean(-1)
    columns = (seen["x"].abs() > 0.5).double().mean(-1)
    assert meter.site_sparsity()[Site(0, "up")] == pytest.approx(1 - float((rows * columns).mean()), abs=1e-6)
    assert meter.site_sparsity()[Site(0, "down")] == pytest.approx(1 - float(rows.mean()), abs=1e-6)


def test_inputs_shared_by_a_group_are_masked_by_each_ones_own_rule(llama, ids):
    thresholds = {(0, "q"): 0.3, (0, "k"): 0.3, (0, "v"): 0.9}
    full = {key: thresholds.get(key, -1.0) for key in oracle.linears(llama)}
    expected = oracle.hooked(llama, ids, oracle.magnitude(full))
    rules = {Site(*key): Rule(threshold=t) for key, t in thresholds.items()}
    with plan_of(llama, rules).applied(llama):
        assert torch.equal(logits(llama, ids), expected)


@pytest.mark.parametrize(
    ("policy", "dense"),
    [(AllButFirst(0), 0), (AllButFirst(5), 5), (LastFraction(0.5), 8), (LastFraction(0.1), 15), (DecodeOnly(), 16)],
)
def test_token_policies(llama, ids, policy, dense):
    thresholds = dict.fromkeys(oracle.linears(llama), 0.3)
    expected = oracle.hooked(llama, ids, oracle.magnitude(thresholds, dense))
    with plan_of(llama, {Site(*k): Rule(threshold=t) for k, t in thresholds.items()}).applied(llama, policy):
        assert torch.equal(logits(llama, ids), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_sparse_nor_counted(llama, side):
    short = torch.randint(3, 97, (1, 10), generator=torch.Generator().manual_seed(4))
    pad = torch.zeros(1, 6, dtype=torch.long)
    long = torch.randint(3, 97, (1, 16), generator=torch.Generator().manual_seed(5))
    padded = torch.cat([pad, short] if side == "left" else [short, pad], 1)
    mask = torch.cat([torch.cat([pad, pad[:, :0]], 1) > 0, torch.ones(1, 10, dtype=torch.bool)], 1)
    mask = mask if side == "left" else mask.flip(1)
    batch, masks = torch.cat([padded, long]), torch.cat([mask, torch.ones(1, 16, dtype=torch.bool)]).long()
    plan = plan_of(llama, {Site(i, r): Rule(threshold=0.3) for i in range(3) for r in ("q", "up", "down")})
    both, alone = Meter(), Meter()
    with plan.applied(llama, AllButFirst(2), both):
        together = logits(llama, batch, attention_mask=masks)
    with plan.applied(llama, AllButFirst(2), alone):
        single = logits(llama, short)
        logits(llama, long)
    real = together[0, 6:] if side == "left" else together[0, :10]
    torch.testing.assert_close(real, single[0], rtol=1e-4, atol=1e-4)
    assert both.tokens == alone.tokens == 8 + 14
    assert both.byte_sparsity() == pytest.approx(alone.byte_sparsity(), abs=2e-3)


def test_decoding_with_a_cache_equals_one_forward(llama, ids):
    plan = plan_of(llama, {Site(i, r): Rule(threshold=0.2) for i in range(3) for r in ("q", "o", "down")})
    with plan.applied(llama, AllButFirst(1)), torch.no_grad():
        whole = llama(input_ids=ids).logits
        first = llama(input_ids=ids[:, :9], use_cache=True)
        second = llama(input_ids=ids[:, 9:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, second], 1), whole, rtol=1e-4, atol=1e-5)


def test_the_model_comes_back_bit_for_bit(model, ids, calibration):
    plan = Teal(target=0.5).fit(model, calibration)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    modules = dict(model.named_modules())
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    dense = logits(model, ids)
    with pytest.raises(IndexError), plan.applied(model):
        logits(model, ids + 1000)
    assert dict(model.named_modules()) == modules
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(logits(model, ids), dense)


def test_a_second_plan_inside_is_refused(llama, calibration):
    plan = Teal(target=0.5).fit(llama, calibration)
    with plan.applied(llama), pytest.raises(PlanError, match="applied to this model already"), plan.applied(llama):
        pass
    with plan.applied(llama):
        pass


def test_a_model_without_sites_is_told_what_was_looked_for():
    with pytest.raises(UnsupportedModelError, match=r"gate_proj or w1.*Found linear layers named: 0"):
        Decoder.of(torch.nn.Sequential(torch.nn.Linear(4, 4)))


def test_generate_runs_under_a_plan(llama, ids, calibration):
    plan = Teal(target=0.3).fit(llama, calibration)
    meter = Meter()
    with plan.applied(llama, DecodeOnly(), meter):
        out = llama.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert out.shape == (2, 20)
    assert meter.tokens == 2 * 3  # the first new token comes from the dense prompt


def test_a_bare_bias_beside_an_act_mask_changes_only_its_own_bytes(llama, ids):
    meters = []
    for extra in ({}, {Site(0, "down"): Rule(bias=torch.zeros(32))}):
        meters.append(Meter())
        with plan_of(llama, {Site(0, ACT): Rule(threshold=0.05)} | extra).applied(llama, meter=meters[-1]):
            logits(llama, ids)
    weights = sum(m.weight.numel() for m in oracle.linears(llama).values())
    assert meters[0].byte_sparsity() - meters[1].byte_sparsity() == pytest.approx(32 / weights)


def test_a_channel_of_scale_zero_rests(llama, ids):
    scale = torch.ones(48)
    scale[5] = 0.0
    meter = Meter()
    with plan_of(llama, {Site(1, "down"): Rule(scale=scale)}).applied(llama, AllButFirst(0), meter):
        logits(llama, ids)
    assert meter.site_sparsity()[Site(1, "down")] == pytest.approx(1 / 48)


def test_inference_mode(llama, ids):
    plan = plan_of(llama, {Site(0, r): Rule(threshold=0.2) for r in ("q", "k", "down")})
    with plan.applied(llama):
        expected = logits(llama, ids)
        with torch.inference_mode():
            assert torch.equal(llama(input_ids=ids).logits, expected)


def test_a_policy_that_leaves_windows_dense_is_fitted_on_all_tokens_but_the_first(llama, calibration):
    plans = [
        Teal(target=0.5).fit(llama, replace(calibration, tokens=policy)) for policy in (DecodeOnly(), AllButFirst(1))
    ]
    assert plans[0].rules == plans[1].rules
