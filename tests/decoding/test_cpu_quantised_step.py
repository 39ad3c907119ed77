"""One token of a quantised model on a CPU, from its codes, is the masked definition's with what they stand for."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from cpu_steps import IDS, RULES, defined, each, gates, model_of, off, step_of, stepped, thresholds, typical, vector
from decoders import WITH_FORM, plan_of
from hypothesis import given, settings
from hypothesis import strategies as st

from resting.baselines.cats import Cats
from resting.baselines.larosa import LaRoSA
from resting.baselines.teal import Teal
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    Calibration,
    Decoder,
    PlanError,
    Rule,
    Site,
    SparsifierError,
)
from resting.sparsifier.decoding import cpu_quantised_layout as layout
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.step import by_step, cpu_codes, cpu_program, cpu_table
from resting.sparsifier.decoding.step.by_step import step_of as step_in
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import quantise
from resting.sparsifier.quantised.nearest import quantised

FORMATS = ["int8-g16", "int4-g32"]
WINDOWS = Calibration(torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(2)))


def coded(family, name, dtype=torch.float32, **more):
    """A tiny model of `family` in a format; matrices have outputs that a group of 32 divides."""
    if name.startswith("int4-g32"):
        more |= {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
    model = model_of(family, dtype, **more)
    quantise(model, Format.parse(name))
    return model


def products(step):
    table = step._program[0]
    return table[table[:, cpu_table.OP] <= cpu_table.GATED_ROWS]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", WITH_FORM)
def test_every_form_dense_and_masked(family, name):
    model = coded(family, name)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for rules in ({}, thresholds(model)):
        wanted = defined(model, rules)
        step = step_of(model, rules)
        assert step.kernels == {name: 3}
        assert set(products(step)[:-1, cpu_table.BITS]) == {int(name[3])}
        assert off(stepped(step), wanted) < 3e-5
        step.restore()
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters())
    assert off(defined(model, thresholds(model)), defined(model, {})) > 0.05


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", RULES)
def test_every_kind_of_rule(kind, name):
    model = coded("qwen2", name)
    rules = RULES[kind](model)
    wanted = defined(model, rules)
    assert off(wanted, defined(model, {})) > 0.01
    assert off(stepped(step_of(model, rules)), wanted) < 3e-5


@pytest.mark.parametrize("rule", [None, Rule(threshold=0.3), Rule(threshold=0.3, shift=0.1, bias=vector(96, 4, 0.3))])
def test_gates_of_one_matrix_whose_halves_do_not_begin_a_group(rule):
    """The second half begins at output 48 of groups of 32, with the latter half of a group."""
    model = model_of("phi3")
    quantise(model, Format.parse("int4-g32"))
    width = Decoder.of(model).projection(Site(0, "gate_up")).out_features
    assert width == 96
    rules = gates(model) | ({} if rule is None else {Site(i, "gate_up"): rule for i in range(3)})
    step = step_of(model, rules)
    assert set(products(step)[:, cpu_table.SKIP]) == {0, 16}
    assert off(stepped(step), defined(model, rules)) < 3e-5


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("make", [thresholds, gates], ids=["thresholds", "gates"])
def test_threads_share_products(make, name, monkeypatch):
    monkeypatch.setattr(cpu_program, "ALWAYS_PARALLEL", 0)
    model = coded("llama", name)
    rules = make(model)
    assert off(stepped(step_of(model, rules, threads=3)), defined(model, rules)) < 3e-5


def test_threads_are_measured_from_codes(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_program, "threads_for_codes", lambda form, *shape: asked.append((form, shape)) or 1)
    monkeypatch.setattr(cpu_program, "threads_for", lambda weight, threads: 1)
    model = coded("llama", "int8-g16")
    step = step_of(model, {}, threads=2)
    assert ("int8-g16", (48, 32, torch.float32, 2)) in {(form.name, shape) for form, shape in asked}
    assert off(stepped(step), defined(model, {})) < 3e-5


def test_bfloat16_rounds_where_the_model_does():
    """Where bfloat16 holds what codes stand for, the step is nearer to the model than that in float32 is."""
    mine, exact = [], []
    for family in ("llama", "qwen2", "gemma2", "olmo2", "phi3"):
        model = model_of(family, torch.bfloat16)
        generator = torch.Generator().manual_seed(2)
        for site in Decoder.of(model).matrices:
            weight = Decoder.of(model).projection(site).weight
            codes = torch.randint(-127, 128, weight.shape, generator=generator)
            codes[::16] = 127  # the largest of every group: its scale is a power of two
            with torch.no_grad():
                weight.copy_(codes / 256)
        quantise(model, Format.parse("int8-g16"))
        wanted, step = defined(model, {}), step_of(model, {})
        found = stepped(step)
        step.restore()
        assert found.dtype == torch.bfloat16
        mine.append(typical(found, wanted))
        exact.append(typical(defined(model.float(), {}), wanted))
    assert sum(mine) < 0.9 * sum(exact)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_the_output_layer_is_read_from_codes(family, name):
    model = coded(family, f"{name}-head", vocab_size=96)
    rules = thresholds(model)
    ids = IDS % 96
    wanted = defined(model, rules, ids)
    step = step_of(model, rules, threads=2)
    assert set(products(step)[:, cpu_table.BITS]) == {int(name[3])}
    assert step.kernels == {f"{name}-head": 3}
    assert off(stepped(step, ids), wanted) < 3e-5
    step.restore()
    assert all(p.is_contiguous() for p in model.parameters())


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("method", [Teal(0.5), Cats(0.3)], ids=["teal", "cats"])
def test_decoding_takes_the_codes_of_fitted_plans(method, name):
    model = coded("llama", name)
    plan = method.plan_for(CalibratedModel(model, WINDOWS))
    with torch.no_grad():
        with plan.applied(model, AllButFirst(1)):
            wanted = model.generate(IDS, max_new_tokens=8, do_sample=False, output_logits=True, **GENERATE)
        with decoding(plan, model, threads=1):
            found = model.generate(IDS, max_new_tokens=8, do_sample=False, output_logits=True, **GENERATE)
            step = step_in(model)
            assert (step.kernels, step.reason) == ({name: 3}, "")
            assert model.forward.steps == 7
    assert torch.equal(found.sequences, wanted.sequences)
    assert off(torch.stack(found.logits), torch.stack(wanted.logits)) < 1e-4


GENERATE = {"return_dict_in_generate": True, "pad_token_id": 0, "eos_token_id": None}


@pytest.mark.parametrize("name", ["int3-g16", "int8-g8", "int4-g16", "int8-g16-zero"])
def test_formats_without_a_kernel_take_what_codes_stand_for_and_say_so(name):
    model = model_of("llama", num_hidden_layers=2)
    quantise(model, Format.parse(name))
    rules = thresholds(model)
    by_step._said.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with decoding(plan_of(model, rules), model, threads=1):
            step = step_in(model)
            assert set(products(step)[:, cpu_table.BITS]) == {0}
            ((kernel, count),) = step.kernels.items()
    why = f"there is no CPU kernel for {name}; allowed"
    assert f"numbers that its codes stand for: {why}" in str(said[0].message)
    assert kernel.startswith(f"{name} dequantised: {why}")
    assert count == 2
    assert off(stepped(step_of(model, rules)), defined(model, rules)) < 3e-5


def test_single_layers_and_neurons_say_that_they_read_no_codes():
    model = model_of("llama")
    quantise(model, Format.parse("int8-g16"))
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    plan = plan_of(model, {Site(0, "q"): Rule(threshold=0.2)})
    by_step._said.clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with decoding(plan, model, threads=1):
            pass
    assert any("stand for: single layers have no kernel from codes" in str(w.message) for w in said)


def test_codes_that_are_not_the_weights_are_refused():
    model = coded("llama", "int8-g16")
    plan, weight = plan_of(model, thresholds(model)), model.model.layers[1].mlp.up_proj.weight
    with torch.no_grad(), decoding(plan, model, threads=1):
        cache = model(IDS[:, :4]).past_key_values
        model(IDS[:, 4:5], past_key_values=cache)
        weight.mul_(2.0)
        with pytest.raises(SparsifierError, match=r"weights at 1\.up were changed after they were stored as int8-g16"):
            model(IDS[:, 5:6], past_key_values=cache)
    assert all(p.is_contiguous() for p in model.parameters())


def test_plans_with_weights_of_their_own_are_refused():
    model = coded("llama", "int8-g16")
    own = each(model, lambda out, n, _: Rule(threshold=0.1, weight=torch.zeros(out, n)), ("q",))
    with (
        pytest.raises(PlanError, match=r"replaces the weights at .*, which are stored as int8-g16"),
        decoding(plan_of(model, own), model),
    ):
        pass
    with pytest.raises(SparsifierError, match="has no product with those stored as int8-g16"):
        step_of(model, own)
    rotated = LaRoSA(0.3).plan_for(CalibratedModel(model_of("llama"), WINDOWS))
    with pytest.raises(PlanError), decoding(rotated, model):
        pass


@settings(max_examples=40, deadline=None)
@given(
    inputs=st.integers(1, 40),
    groups=st.integers(1, 4),
    first=st.integers(0, 60),
    seed=st.integers(0, 99),
    bits=st.sampled_from([4, 8]),
)
def test_rows_from_codes_are_those_of_the_dequantised_weights(inputs, groups, first, seed, bits):
    """Any run of outputs, any choice of its rows, odd numbers of inputs: against sums in float64."""
    generator = torch.Generator().manual_seed(seed)
    held = quantised(torch.randn(32 * groups, inputs, generator=generator), Format(bits, 32))
    first = min(first, held.outputs - 1)
    x = torch.randn(inputs, generator=generator)
    laid = layout.by_outputs(held, slice(first, held.outputs))
    chosen = np.flatnonzero(torch.rand(held.outputs - first, generator=generator).numpy() < 0.6)
    out, wide = np.full(len(chosen), math.nan, np.float32), np.full(2 * (inputs + 1), math.nan, np.float32)
    scales = laid.scales[first // 32 :]
    args = laid.codes, scales, laid.times, laid.add, 32, first % 32, x.numpy(), chosen, len(chosen), out, wide, 1
    _call(*args)
    wanted = held.dequantised().double()[:, first:].T[chosen] @ x.double()
    size = held.dequantised().double()[:, first:].T[chosen].abs() @ x.double().abs()
    assert (torch.from_numpy(out).double() - wanted).abs().le(3e-6 * size + 1e-30).all()


def _call(*args):
    """Kernels of a step are called by compiled code alone: here by a wrapper of one line."""
    global _compiled
    if _compiled is None:
        from numba import njit

        by_rows = cpu_codes.by_rows
        _compiled = njit(lambda *given: by_rows(*given))
    _compiled(*args)


_compiled = None


def test_an_output_layer_is_gone_through_in_tiles():
    """Its outputs are more than one tile, and the last tile is not whole: against sums in float64."""
    generator = torch.Generator().manual_seed(3)
    outputs = 2 * cpu_codes.TILE + 96
    held = quantised(torch.randn(outputs, 6, generator=generator), Format(4, 32))
    laid, x = layout.by_inputs(held), torch.randn(6, generator=generator)
    y, wide = np.full(outputs, math.nan, np.float32), np.empty(cpu_codes.scratch_by_columns(4, outputs // 32, 1))
    from numba import njit

    by_columns = cpu_codes.by_columns
    none, wide = np.empty(0, np.float32), wide.astype(np.float32)
    args = *laid, 32, np.arange(7), np.append(x.numpy(), np.float32(0.0)), 6, none, none, y, wide, 1
    njit(lambda *given: by_columns(*given))(*args)
    wanted = x.double() @ held.dequantised().double()
    assert torch.allclose(torch.from_numpy(y).double(), wanted, atol=1e-4)
