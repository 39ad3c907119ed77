"""Decode kernels and the plans that use them, against products written from the formula."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from families import build as tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from served import decoded

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.method.mean_error import MeanError
from resting.sparsifier import Calibration, Plan, Rule, Site, SparsifierError
from resting.sparsifier.decoding import cpu_numba
from resting.sparsifier.decoding.break_even import break_even, threads_for
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.decoder import DecodeLinear, decoding
from resting.sparsifier.decoding.products import columns, rows
from resting.sparsifier.decoding.step.by_step import step_of
from resting.sparsifier.fingerprint import of_model

DTYPES = [torch.float32, torch.bfloat16]


def close(found, wanted, dtype):
    """Equal up to the rounding of one stored number and of a sum in fp32."""
    bound = 2.0**-7 if dtype == torch.bfloat16 else 1e-5
    scale = wanted.abs().clamp(min=1.0)
    return bool(((found.double() - wanted).abs() <= bound * scale).all())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(DTYPES), st.sampled_from([1, 2]), st.integers(0, 10**6))
def test_columns_are_the_formula(inputs, outputs, dtype, threads, seed):
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=random).to(dtype)
    x = torch.randn(inputs, generator=random).to(dtype)
    threshold, scale = torch.rand(inputs, generator=random), 0.5 + torch.rand(inputs, generator=random)
    bias, shift = torch.randn(outputs, generator=random), torch.randn(inputs, generator=random) / 4
    rule = Rule(threshold=threshold, scale=scale, shift=shift)
    moved = (x - shift.to(dtype)).double()
    kept = torch.where(scale.double() * moved.abs() > threshold.double(), moved, 0.0)
    found = columns(input_major(w), rule, bias, threads)(x[None, None])
    assert found.shape == (1, 1, outputs)
    assert close(found[0, 0], kept @ w.double().T + bias.double(), dtype)


@pytest.mark.parametrize("outputs", [1, 15, 16, 17, 33, 70])
@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_no_part_writes_past_the_outputs(outputs, parts):
    w, x = np.ones((4, outputs), np.float32), np.ones(4, np.float32)
    y, sums = np.full(outputs + 64, -7.0, np.float32), np.full(outputs + 64, -7.0, np.float32)
    none, keep = np.empty(0, np.float32), np.full(4, -1.0, np.float32)
    scratch = np.empty(5, np.int64), np.empty(5, np.float32), sums
    cpu_numba.gemv_parallel(w, x.ctypes.data, none, keep, none, y.ctypes.data, *scratch, parts)
    assert (y[:outputs] == 4.0).all()
    assert (y[outputs:] == -7.0).all()
    assert (sums[outputs:] == -7.0).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from(DTYPES), st.sampled_from([1, 2]), st.integers(0, 10**6))
def test_rows_are_the_formula(inputs, outputs, dtype, threads, seed):
    random = torch.Generator().manual_seed(seed)
    w = torch.randn(outputs, inputs, generator=random).to(dtype)
    x, gate = (torch.randn(n, generator=random).to(dtype) for n in (inputs, outputs))
    bias = torch.randn(outputs, generator=random)
    found = rows(w, Rule(threshold=0.5), bias, threads)(x[None, None], gate[None, None])[0, 0]
    wanted = gate.double() * (x.double() @ w.double().T + bias.double())
    assert close(found[gate.abs() > 0.5], wanted[gate.abs() > 0.5], dtype) or dtype == torch.bfloat16
    assert ((found.double() - wanted).abs() <= 2.0**-6 * wanted.abs().clamp(min=1.0))[gate.abs() > 0.5].all()
    assert not found[gate.abs() <= 0.5].any()


@settings(max_examples=30, deadline=None)
@given(
    *(st.integers(1, 70), st.integers(1, 70), st.integers(1, 90)),
    *(st.sampled_from(DTYPES), st.sampled_from([1, 2]), st.booleans(), st.integers(0, 10**6)),
)
def test_a_low_rank_part_is_the_formula(inputs, outputs, rank, dtype, threads, biased, seed):
    random = torch.Generator().manual_seed(seed)
    w, u, v = (
        torch.randn(shape, generator=random).to(dtype) for shape in ((outputs, inputs), (outputs, rank), (rank, inputs))
    )
    x, bias = torch.randn(inputs, generator=random).to(dtype), torch.randn(outputs, generator=random)
    rule = Rule(threshold=0.5, low_rank=(u, v))
    kept = torch.where(x.double().abs() > 0.5, x.double(), 0.0)
    wanted = kept @ w.double().T + (x.double() - kept) @ v.double().T @ u.double().T + bias.double() * biased
    found = columns(input_major(w), rule, bias if biased else None, threads)(x)
    bound = (2.0**-7 if dtype == torch.bfloat16 else 1e-5) * (1.0 + wanted.abs().max())
    assert (found.double() - wanted).abs().max() <= bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("density", ["none", "all"])
def test_nothing_and_everything_at_rest(dtype, density):
    w, x = torch.randn(24, 40).to(dtype), torch.randn(1, 1, 40).to(dtype)
    found = columns(input_major(w), Rule(threshold=0.0 if density == "all" else 100.0))(x)
    wanted = x.double() @ w.double().T if density == "all" else torch.zeros(1, 1, 24)
    assert close(found, wanted.double(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_passes_as_through_a_dense_layer(dtype, value):
    w, x = torch.ones(8, 16).to(dtype), torch.zeros(1, 1, 16).to(dtype)
    x[..., 3] = value
    found = columns(input_major(w), Rule(threshold=1.0))(x)
    assert torch.equal(found.isnan(), torch.full_like(found, value != value).bool())
    assert bool((found == value).all()) or value != value


def test_bfloat16_is_rounded_to_nearest_even():
    w = torch.eye(64).bfloat16()
    x = torch.randn(1, 1, 64).bfloat16()
    start = torch.randn(64)
    found = columns(input_major(w), Rule(), start)(x)
    assert torch.equal(found[0, 0], (x[0, 0].float() + start).bfloat16())


def test_what_kernels_do_not_take_is_refused():
    w = torch.randn(8, 16)
    with pytest.raises(SparsifierError, match="float32, bfloat16, not float64"):
        columns(input_major(w.double()), Rule())
    with pytest.raises(SparsifierError, match="topk"):
        columns(input_major(w), Rule(topk=3))
    with pytest.raises(SparsifierError, match="topk"):
        rows(w, Rule(topk=3))
    with pytest.raises(SparsifierError, match="input-major"):
        columns(w, Rule())
    with pytest.raises(SparsifierError, match="not both"):
        columns(input_major(w), Rule(shift=0.1, low_rank=(torch.ones(8, 1), torch.ones(1, 16))))
    with pytest.raises(SparsifierError, match="not for meta"):
        columns(torch.empty(16, 8, device="meta").t(), Rule())


def test_threads_are_woken_where_that_pays():
    assert threads_for(torch.empty(16, 16), 1) == 1
    assert threads_for(torch.empty(16, 16), 2) == 1  # waking another one takes longer than the product
    assert threads_for(torch.empty(64, 48), 2) in (1, 2)


def test_break_even_is_a_share():
    assert 0.0 <= break_even(torch.empty(64, 32)) <= 1.0


METHODS = [Teal(target=0.4), Cats(target=0.2), Chess(target=0.3), RSparse(target=0.4), MeanError(Teal(target=0.4))]


@pytest.mark.parametrize("known", [True, False], ids=["by a step", "by layers"])
@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.label)
def test_a_plan_decodes_as_it_is_defined(model, method, known, monkeypatch):
    """By a step of the whole model, or layer by layer where its form is not known."""
    if not known:
        monkeypatch.setattr("resting.sparsifier.decoding.decoder.known_form", lambda *given: None)
    ids = torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(0))
    plan = method.fit(model, Calibration(ids))
    before = {name: p.clone() for name, p in model.named_parameters()}
    strides = {name: p.stride() for name, p in model.named_parameters()}
    with plan.applied(model):
        wanted = decoded(model, ids[:1], 8)
    with decoding(plan, model, threads=1):
        found = decoded(model, ids[:1], 8)
        kinds = {type(m).__name__ for m in model.modules()}
        served = step_of(model)
    assert torch.allclose(found, wanted, atol=2e-4)
    assert (served is not None) == known
    assert ("DecodeLinear" in kinds) != known
    assert ("DecodeMLP" in kinds) == (not known and any(site.role == "act" for site in plan.rules))
    for name, p in model.named_parameters():  # bit for bit, and in the usual order
        assert torch.equal(p, before[name])
        assert p.stride() == strides[name]
    assert not any(isinstance(m, DecodeLinear) for m in model.modules())


def test_batches_and_prompts_follow_the_definition(model):
    ids = torch.randint(3, 97, (4, 20), generator=torch.Generator().manual_seed(1))
    plan = Teal(target=0.4).fit(model, Calibration(ids))
    with torch.inference_mode():
        with plan.applied(model):
            wanted = model(input_ids=ids).logits
        with decoding(plan, model, threads=1):
            assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("method", [Teal(0.4), Cats(0.2)])
def test_weights_made_in_inference_mode_stay_what_they_are(method, known, monkeypatch):
    if not known:
        monkeypatch.setattr("resting.sparsifier.decoding.decoder.known_form", lambda *given: None)
    windows = torch.randint(3, 97, (24, 32), generator=torch.Generator().manual_seed(1))
    plan = method.fit(tiny("llama"), Calibration(windows))
    with torch.inference_mode():
        model = tiny("llama")
    for _ in range(2):  # leaves the model such that it is taken again
        with decoding(plan, model, threads=1):
            found = decoded(model, windows[:1], 8)
        assert all(parameter.is_inference() for parameter in model.parameters())
        with plan.applied(model):
            assert torch.allclose(found, decoded(model, windows[:1], 8), atol=2e-4)


def test_a_low_rank_part_at_up_under_an_act_mask_is_refused_and_nothing_is_left_behind():
    model = tiny("llama")
    low_rank = torch.zeros(48, 2), torch.zeros(2, 32)
    rules = {Site(0, "act"): Rule(threshold=0.1), Site(0, "up"): Rule(low_rank=low_rank)}
    plan = Plan(rules, method="x", target=0.1, nominal=0.1, model=of_model(model))
    with pytest.raises(SparsifierError, match="low-rank"), decoding(plan, model, threads=1):
        pass
    assert all(p.is_contiguous() for p in model.parameters())
