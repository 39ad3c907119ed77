"""Quantised weights: codes against the formula, what is counted as read, and what a model's weights then are."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conformance import conforms
from families import SMALL, build
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from transformers import AutoModelForCausalLM, MixtralConfig

from resting.baselines.cats import Cats
from resting.baselines.larosa import LaRoSA
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.benchmarks.cells import registry
from resting.sparsifier import AllButFirst, CalibratedModel, Decoder, Meter, Plan, PlanError, Rule, SparsifierError
from resting.sparsifier.fingerprint import of_model
from resting.sparsifier.quantised.compensated import compensated, quantise_compensated
from resting.sparsifier.quantised.formats import NAMES, Format, bits_a_weight
from resting.sparsifier.quantised.model import check_plan, codes_of, format_of, quantise
from resting.sparsifier.quantised.nearest import quantised

FORMATS = ["int8-g8", "int4-g8", "int4-g16-zero", "int3-g8", "int3-g16-zero"]
NUMBERS = st.floats(-4.0, 4.0, width=32).filter(lambda v: v == 0 or abs(v) > 1e-3)
WEIGHTS = arrays.arrays(np.float32, st.tuples(st.just(16), st.integers(1, 5)), elements=NUMBERS)


def by_the_formula(weight, bits, group, zero):
    """Codes and numbers of [out, in] weights, one by one in float64, with scales as stored (float16)."""
    out, width = weight.shape
    lowest, highest = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    numbers = np.zeros_like(weight, dtype=np.float64)
    for i in range(width):
        for first in range(0, out, group):
            run = weight[first : first + group, i].astype(np.float64)
            if zero:
                low, high = min(run.min(), 0.0), max(run.max(), 0.0)
                scale = (high - low) / (highest - lowest)
            else:
                low, scale = 0.0, np.abs(run).max() / highest
            scale = float(np.float16(scale)) if scale > 0 else 1.0
            origin = np.clip(np.round(lowest - low / scale), lowest, highest) if zero else 0.0
            codes = np.clip(np.round(run / scale) + origin, lowest, highest)
            numbers[first : first + group, i] = (codes - origin) * scale
    return numbers


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=40, deadline=None)
@given(weight=WEIGHTS)
def test_numbers_are_those_of_the_formula_and_near(name, weight):
    form = Format.parse(name)
    found = quantised(torch.from_numpy(weight), form)
    numbers = found.dequantised().T.double().numpy()
    wanted = by_the_formula(weight, form.bits, form.group, form.zero)
    steps = found.scales.double().repeat_interleave(form.group, 1).T.numpy()
    # A tie between two codes may fall to either side: float32 divides, the formula float64.
    assert (np.abs(numbers - wanted) <= 1.001 * steps * (np.abs(numbers - wanted) > 1e-9)).all()
    edge = 2.0 if form.zero else 0.5 + form.highest * 2**-10  # a rounded scale clips the largest, a rounded zero both
    assert (np.abs(numbers - weight) <= edge * steps + 1e-7).all()
    assert int(found.codes.min()) >= form.lowest
    assert int(found.codes.max()) <= form.highest
    assert found.bits == round(weight.size * form.bits_a_weight)


@pytest.mark.parametrize("name", ["int8-g8", "int4-g8", "int3-g8"])
@settings(max_examples=40, deadline=None)
@given(weight=WEIGHTS, sign=st.booleans())
def test_symmetric_codes_are_found_again_and_change_sign_with_the_weights(name, weight, sign):
    form = Format.parse(name)
    found = quantised(torch.from_numpy(weight), form)
    numbers = found.dequantised().T
    again = quantised(-numbers if sign else numbers, form)
    assert torch.equal(again.codes, -found.codes if sign else found.codes)
    assert torch.equal(again.dequantised(), -found.dequantised() if sign else found.dequantised())


def test_more_bits_and_smaller_groups_are_nearer():
    weight = torch.randn(256, 64, generator=torch.Generator().manual_seed(0))

    def error(name):
        return float((quantised(weight, Format.parse(name)).dequantised().T - weight).norm())

    assert error("int8") < error("int4-g32") < error("int4-g128") < error("int3-g128")
    assert error("int4-g128-zero") < error("int4-g128")


@pytest.mark.parametrize(
    ("name", "bits"), [("as-is", 16), ("int8", 8.125), ("int4-g128", 4.125), ("int4-g32", 4.5), ("int3-g128", 3.125)]
)
def test_bits_of_the_usual_formats(name, bits):
    assert name in NAMES
    assert bits_a_weight(name) == bits
    assert bits_a_weight("int4-g32-zero") == 4 + (16 + 4) / 32


@pytest.mark.parametrize("name", ["int4", "int5-g32", "int8-g0", "q4_0", "", "int4-g-32", "INT8", "int4-g032"])
def test_unknown_formats_are_refused_with_what_is_allowed(name):
    with pytest.raises(SparsifierError, match=r"there is no weight format .*int4-g128"):
        Format.parse(name)


def test_one_format_has_one_name():
    with pytest.raises(SparsifierError, match="'int8-g128' is called 'int8'"):
        Format.parse("int8-g128")


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_beyond_float16_are_bfloat16(scale):
    weight = torch.randn(16, 4, generator=torch.Generator().manual_seed(0)) * scale
    found = quantised(weight, Format.parse("int8-g8"))
    assert found.scales.dtype == torch.bfloat16
    assert float((found.dequantised().T - weight).abs().max()) < 0.02 * float(weight.abs().max())


def test_a_group_that_does_not_divide_is_refused_with_those_that_do_and_nothing_changes(llama):
    before = of_model(llama)
    with pytest.raises(SparsifierError, match=r"every 128 outputs.*does not divide the 32 of 0\.q.*int4-g16, int4-g8$"):
        quantise(llama, Format.parse("int4-g128"))
    assert of_model(llama) == before
    assert format_of(llama) is None


def test_weights_that_are_not_finite_are_refused():
    with pytest.raises(SparsifierError, match="not finite"):
        quantised(torch.tensor([[float("nan")] * 2] * 8), Format.parse("int4-g8"))


def test_a_model_is_computed_with_what_its_codes_stand_for(llama, ids):
    plain = {site: Decoder.of(llama).projection(site).weight.clone() for site in Decoder.of(llama).matrices}
    others = {n: p.clone() for n, p in llama.named_parameters() if "proj" not in n}
    form = Format.parse("int4-g8")
    codes = quantise(llama, form)
    for site, weight in plain.items():
        held = Decoder.of(llama).projection(site).weight
        assert torch.equal(held, quantised(weight, form).dequantised().T)
        assert not torch.equal(held, weight)
    assert all(torch.equal(p, others[n]) for n, p in llama.named_parameters() if n in others)
    kept = codes_of(llama)
    assert kept is not None
    assert kept[0] == form == format_of(llama)
    assert set(kept[1]) == set(codes) == set(plain)
    with pytest.raises(SparsifierError, match="is in int4-g8 already"):
        quantise(llama, form)
    with torch.no_grad():
        Decoder.of(llama).projection(next(iter(codes))).weight[0, 0] += 1.0
    with pytest.raises(SparsifierError, match=r"weights at 0\.q were changed"):
        codes_of(llama)


@pytest.mark.parametrize("name", ["teal", "cats", "rsparse", "wina", "was", "mean-error", "countdown-m"])
def test_methods_conform_on_quantised_weights(name, model, ids, calibration, tmp_path):
    quantise(model, Format.parse("int4-g8"))
    conforms(registry.methods()[name], {}, model, ids, calibration, tmp_path)


def run(model, plan, ids, form):
    meter = Meter()
    with torch.no_grad(), plan.applied(model, AllButFirst(1), meter):
        model(ids)
    stored = Format.parse(form)
    return meter.byte_sparsity(), meter.bits_read() if stored is None else meter.bits_read(
        stored.bits, stored.bits_beside
    )


@pytest.mark.parametrize("name", ["as-is", "int8-g8", "int4-g16", "int3-g8-zero"])
def test_bits_read_of_input_masks_are_the_share_that_is_read(name, llama, ids, calibration):
    plan = Teal(0.5).plan_for(CalibratedModel(llama, calibration))
    sparsity, bits = run(llama, plan, ids, name)
    assert 0.3 < sparsity < 0.7
    assert bits == pytest.approx((1.0 - sparsity) * bits_a_weight(name))
    assert run(llama, Plan({}, "dense", 0.0, 0.0, of_model(llama)), ids, name)[1] == bits_a_weight(name)


def test_bits_read_count_what_rules_add_in_sixteen_bits(llama, ids, calibration):
    calibrated = CalibratedModel(llama, calibration)
    decoder = Decoder.of(llama)
    for plan in (RSparse(0.4).plan_for(calibrated), registry.build("mean-error(teal)", 0.4).plan_for(calibrated)):
        added = sum(rule.extra_elements() for rule in plan.rules.values()) / decoder.elements
        assert added > 0
        sparsity, bits = run(llama, plan, ids, "int4-g16")
        assert bits == pytest.approx((1.0 - sparsity - added) * 5.0 + added * 16.0)


def test_scales_of_outputs_that_rest_are_counted_whole(llama, ids, calibration):
    """Under CATS rows of up and columns of down rest: those of down with their scales, of up only the codes."""
    plan = Cats(0.3).plan_for(CalibratedModel(llama, calibration))
    meter = Meter()
    with torch.no_grad(), plan.applied(llama, AllButFirst(1), meter):
        llama(ids)
    decoder, codes, scales = Decoder.of(llama), 4.0, 1.0
    wanted = 0.0
    for site, share in meter.site_sparsity().items():
        rests = 0.0 if site.role == "up" else share
        wanted += decoder.projection(site).elements * (codes * (1 - share) + scales * (1 - rests))
    assert meter.bits_read(codes, scales) == pytest.approx(wanted / decoder.elements)
    assert meter.bits_read(codes, scales) > (1 - meter.byte_sparsity()) * (codes + scales)


def test_plans_with_other_weights_are_refused(llama, ids, calibration):
    rewritten = LaRoSA(0.3).plan_for(CalibratedModel(llama, calibration))
    site = Decoder.of(llama).sites(("down",))[0]
    check_plan(llama, rewritten)
    quantise(llama, Format.parse("int8-g8"))
    replaced = Plan({site: Rule(weight=torch.zeros(32, 48))}, "mine", 0.1, 0.1, of_model(llama))
    with pytest.raises(PlanError, match=r"rewrites the model .* stored as int8-g8; allowed"):
        check_plan(llama, rewritten)
    with pytest.raises(PlanError, match=r"mine replaces the weights at 0\.down"):
        check_plan(llama, replaced)
    check_plan(llama, Teal(0.3).plan_for(CalibratedModel(llama, calibration)))


def test_a_model_in_bfloat16_holds_numbers_rounded_once_more():
    model = build("llama").bfloat16()
    codes = quantise(model, Format.parse("int8-g8"))
    for site, held in codes.items():
        weight = Decoder.of(model).projection(site).weight
        assert torch.equal(weight, held.dequantised().T.bfloat16())
    assert codes_of(model) is not None
    assert math.isclose(Format.parse("int8-g8").bits_a_weight, 10.0)


def outputs_apart(weight, held, moment):
    gap = held.dequantised().T.double() - weight.double()
    return float((gap @ moment * gap).sum())


@pytest.mark.parametrize("name", ["int4-g8-gptq", "int3-g16-zero-gptq", "int8-g8-gptq"])
def test_compensated_codes_give_nearer_outputs(name):
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(80, 80, generator=generator).double()
    moment = mixing @ mixing.T / 80
    weight = torch.randn(48, 80, generator=generator)
    form = Format.parse(name)
    found, plain = compensated(weight, moment, form), quantised(weight, form)
    assert outputs_apart(weight, found, moment) < 0.8 * outputs_apart(weight, plain, moment)
    assert found.bits == plain.bits
    assert int(found.codes.min()) >= form.lowest
    assert int(found.codes.max()) <= form.highest


def test_compensated_codes_are_those_of_the_formula():
    """Against the definition: round an input, then move those to come so that the outputs are as near as can be."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(9, 9, generator=generator).double()
    moment, weight = mixing @ mixing.T, torch.randn(8, 9, generator=generator)
    found = compensated(weight, moment, Format.parse("int4-g8-gptq"))
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(9).double()
    left, order = weight.double().clone(), damped.diagonal().argsort(descending=True).tolist()
    for place, i in enumerate(order):
        rounded = quantised(left[:, i : i + 1].float(), Format.parse("int4-g8")).dequantised()[0].double()
        assert torch.equal(found.dequantised()[i].double(), rounded)
        error, later = left[:, i] - rounded, order[place + 1 :]
        if later:  # least squares: the gap at later inputs that minimises the damped quadratic form, given this one's
            gain = torch.linalg.solve(damped[later][:, later], damped[later, i])
            left[:, later] += torch.outer(error, gain)
        left[:, i] = rounded


def test_inputs_that_are_independent_need_no_compensation():
    weight = torch.randn(16, 12, generator=torch.Generator().manual_seed(0))
    found = compensated(weight, torch.eye(12).double(), Format.parse("int4-g8-gptq"))
    assert torch.equal(found.codes, quantised(weight, Format.parse("int4-g8")).codes)


def test_a_compensated_model_is_nearer_to_the_plain_one(calibration, ids):
    logits = {}
    for name in ("as-is", "int4-g16", "int4-g16-gptq"):
        model = build("llama")
        form = Format.parse(name)
        if form is not None and form.compensated:
            codes = quantise_compensated(CalibratedModel(model, calibration), form)
            assert codes_of(model) == (form, codes)
        elif form is not None:
            quantise(model, form)
        with torch.no_grad():
            logits[name] = model(calibration.windows[:8]).logits
    apart = {name: float((found - logits["as-is"]).norm()) for name, found in logits.items()}
    assert apart["int4-g16-gptq"] < 0.9 * apart["int4-g16"]


def test_models_with_experts_are_not_compensated(calibration):
    config = MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    mixture = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(SparsifierError, match="experts"):
        quantise_compensated(CalibratedModel(mixture, calibration), Format.parse("int4-g8-gptq"))
    assert format_of(mixture) is None


def test_the_nearest_codes_do_not_go_by_the_name_of_others():
    model = build("llama")
    before = of_model(model)
    with pytest.raises(SparsifierError, match=r"not int4-g8-gptq: .* by quantise_compensated"):
        quantise(model, Format.parse("int4-g8-gptq"))
    assert format_of(model) is None
    assert of_model(model) == before
