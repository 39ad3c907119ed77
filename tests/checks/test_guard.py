"""The guard holds on the committed references, and fails on each thing that it is there for."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resting.benchmarks.checks.guard import check, exact, jitter, quality, speed
from resting.benchmarks.errors import BenchmarkError
from resting.sparsifier import Decoder, Plan, Rule, Site, folded_bias
from resting.sparsifier.decoding.products import columns

REFERENCE = check.load(Path(__file__).parents[2] / "results" / "guard" / "reference.json")


def broken(found):
    """Names of what does not hold, of the figures that were measured."""
    return {
        one.name for one in check.findings(found, {k: v for k, v in REFERENCE.items() if k in found}) if not one.holds
    }


@pytest.fixture(scope="module")
def plans_and_dense():
    model, tokenizer = quality.embedded()
    calibration, evaluation = quality.windows(tokenizer)
    return quality.plans(model, calibration), quality.dense(model, evaluation)


@pytest.fixture(scope="module")
def layer():
    return speed.Layer(*speed.SHAPE)


def changed(plan, block=None, **change):
    """A plan whose rules, of one block or of all, are changed by functions of the rule."""
    rules = {
        site: replace(rule, **{name: function(rule) for name, function in change.items()})
        if block in (None, site.block)
        else rule
        for site, rule in plan.rules.items()
    }
    return replace(plan, rules=rules)


@pytest.mark.real
def test_it_holds_on_this_machine(plans_and_dense):
    plans, dense = plans_and_dense
    assert not broken(exact.measure() | quality.measure_dense(dense) | quality.measure(dense, plans))


@pytest.mark.real
@pytest.mark.parametrize("seed", [0, 1])
def test_it_holds_where_thresholds_and_biases_round_differently(plans_and_dense, seed):
    plans, dense = plans_and_dense
    found = jitter.of_quality(dense, plans, seed)
    assert not broken(found)
    assert abs(found["kl teal"] - REFERENCE["kl teal"]) > 1e-4, "jitter was to move something"


@pytest.mark.parametrize("seed", range(4))
def test_masks_are_the_same_where_thresholds_and_biases_round_differently(seed):
    assert not broken(jitter.of_exact(seed))


def test_jitter_moves_every_threshold_and_bias_by_the_rounding_of_float32():
    bias = torch.linspace(1.0, 2.0, 100)
    site = Site(0, "down")
    plan = Plan({site: Rule(threshold=0.5, bias=bias)}, "m", 0.5, 0.5, "model")
    rule = jitter.jittered(plan, 0).rules[site]
    moved = (rule.bias / bias.double() - 1).abs()
    assert 0 < abs(rule.threshold / 0.5 - 1) < 1e-6
    assert float(moved.min()) > 0
    assert 0.3e-7 < float(moved.mean()) < 3e-7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_folded_biases_are_in_float32_but_for_a_model_in_float64(dtype):
    built = exact.model().to(dtype)
    weight = built.model.layers[0].mlp.down_proj.weight
    alpha = torch.linspace(0, 1, 40, dtype=torch.float64)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    found = folded_bias(Decoder.of(built), Site(0, "down"), alpha)
    assert found.dtype == kept
    assert torch.equal(found, weight.to(kept) @ alpha.to(kept))


def wrong_thresholds(plans, block=None):
    return changed(plans["teal"], block, threshold=lambda rule: rule.threshold * 1.05)


def swapped_masks(plans, block=None):
    """Gate takes down's rule and the other way round."""
    rules = plans["teal"].rules
    other = {"gate": "down", "down": "gate"}
    swapped = {Site(s.block, other.get(s.role, s.role)) if block in (None, s.block) else s: rules[s] for s in rules}
    return replace(plans["teal"], rules={site: swapped[site] for site in rules})


def doubled_biases(plans, block=None):
    return changed(plans["mean-error(teal)"], block, bias=lambda rule: None if rule.bias is None else 2.0 * rule.bias)


FAULTS = {"teal": [wrong_thresholds, swapped_masks], "mean-error(teal)": [doubled_biases]}


@pytest.mark.real
@pytest.mark.parametrize(("name", "fault"), [(name, fault) for name, faults in FAULTS.items() for fault in faults])
def test_a_fault_is_found_in_one_block_and_in_all(plans_and_dense, name, fault):
    plans, dense = plans_and_dense
    figure = f"layer error {name}"
    for block in (10, None):
        assert broken({figure: quality.layer_error(dense, fault(plans, block))}) == {figure}


@pytest.mark.real
def test_a_wrong_threshold_is_found_in_the_whole_model(plans_and_dense):
    plans, dense = plans_and_dense
    found = broken(quality.measure(dense, {"teal": wrong_thresholds(plans)}))
    assert found == {"kl teal", "byte sparsity teal", "layer error teal"}


def test_a_flipped_comparison_is_found(monkeypatch):
    from resting.sparsifier import masking

    right = masking.kept_input
    monkeypatch.setattr(masking, "kept_input", lambda x, cutoff, shift=0.0: x - right(x, cutoff, shift))
    found = broken(exact.measure())
    assert {"masks teal", "masks cats", "masks chess"} <= found


def test_a_slow_kernel_is_found(layer):
    assert not broken(speed.measure(layer))

    def ignores_what_rests(weight, rule, threads=1):
        return columns(weight, type(rule)(), threads=threads)

    def waits(weight, rule, threads=1):
        product = columns(weight, rule, threads=threads)
        return lambda x: (time.sleep(0.002), product(x))[1]

    assert "kernel 0.9 over 0" in broken(speed.measure(layer, ignores_what_rests))
    assert "kernel 0.9 over linear" in broken(speed.measure(layer, waits))


def micro(tmp_path, seconds):
    """The JSON of a run of the micro-benchmarks, with these times of the guard's products."""
    cases = [
        {"group": group, "extra_info": {"product": product}, "stats": {"q1": value}}
        for group, factor in ((speed.label(*speed.SHAPE), 1.0), ("another", 9.0))
        for product, value in ((name, factor * value) for name, value in seconds.items())
    ]
    file = tmp_path / "0001_run.json"
    file.write_text(json.dumps({"benchmarks": cases}))
    return file


def test_ratios_are_read_from_a_run_of_the_micro_benchmarks(tmp_path):
    file = micro(tmp_path, {"linear": 0.004, "columns 0": 0.005, "columns 0.5": 0.003, "columns 0.9": 0.001})
    found = speed.read(file)
    assert found == pytest.approx({"kernel 0.9 over 0": 5.0, "kernel 0.9 over linear": 4.0})
    assert not broken(found)
    slow = speed.read(micro(tmp_path, {"linear": 0.004, "columns 0": 0.005, "columns 0.9": 0.0025}))
    assert broken(slow) == {"kernel 0.9 over 0", "kernel 0.9 over linear"}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"benchmarks": []}'])
def test_a_run_without_the_products_is_named(tmp_path, content):
    file = tmp_path / "0001_run.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(BenchmarkError, match=r"0001_run\.json lacks times of the products of 2048x2048 float32"):
        speed.read(file)


def test_bytes_read_are_those_of_the_inputs_that_are_kept(layer):
    assert layer.bytes_read("linear") == layer.bytes_read("columns 0") == 2048 * 2048 * 4
    assert layer.bytes_read("columns 0.9") / layer.bytes == pytest.approx(0.1, abs=1e-3)
    assert layer.bytes_read("rows 0.5") / layer.bytes == pytest.approx(0.5, abs=1e-3)


def test_masks_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        found = exact.measure()
        assert found == {name: REFERENCE[name] for name in found}
    finally:
        torch.set_num_threads(before)


def test_a_figure_that_one_side_lacks_does_not_hold():
    lines = check.findings({"nats dense": 1.0}, {"nats dense": 1.0, "masks teal": "x"})
    assert [one.holds for one in lines] == [True, False]


def test_references_that_cannot_be_read_are_named(tmp_path):
    for content in (None, "{", "[]", "{}"):
        file = tmp_path / "reference.json"
        if content is not None:
            file.write_text(content)
        with pytest.raises(BenchmarkError, match=r"reference\.json holds no references"):
            check.load(file)
