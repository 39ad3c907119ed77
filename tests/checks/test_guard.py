"""The guard holds on the committed references, and fails on each thing that it is there for."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from resting.benchmarks.checks.guard import check, exact, quality, speed
from resting.benchmarks.errors import BenchmarkError
from resting.sparsifier.decoding.products import columns

REFERENCE = check.load(Path(__file__).parents[2] / "results" / "guard" / "reference.json")


def broken(found):
    """Names of what does not hold, of the figures that were measured."""
    return {
        one.name for one in check.findings(found, {k: v for k, v in REFERENCE.items() if k in found}) if not one.holds
    }


@pytest.fixture(scope="module")
def bench():
    model, tokenizer = quality.embedded()
    calibration, evaluation = quality.windows(tokenizer)
    return model, quality.plans(model, calibration), evaluation


def changed(plan, **change):
    """A plan whose rules are changed by functions of the rule."""
    rules = {
        site: replace(rule, **{name: function(rule) for name, function in change.items()})
        for site, rule in plan.rules.items()
    }
    return replace(plan, rules=rules)


@pytest.mark.real
def test_it_holds_on_this_machine(bench):
    model, plans, evaluation = bench
    assert not broken(exact.measure() | quality.measure(model, plans, evaluation))


@pytest.mark.real
def test_a_wrong_threshold_is_found(bench):
    model, plans, evaluation = bench
    wrong = changed(plans["teal"], threshold=lambda rule: rule.threshold * 1.05)
    found = broken(quality.measure(model, {"teal": wrong}, evaluation))
    assert {"nats above dense teal", "byte sparsity teal"} <= found


@pytest.mark.real
def test_a_swapped_mask_is_found(bench, monkeypatch):
    model, plans, evaluation = bench
    swapped = {}
    for site in plans["teal"].rules:  # gate takes down's rule and the other way round
        other = {"gate": "down", "down": "gate"}.get(site.role, site.role)
        rule = plans["teal"].rules[type(site)(site.block, other)]
        swapped[site] = plans["teal"].rules[site] if site.role == other else replace(rule, bias=None)
    found = broken(quality.measure(model, {"teal": replace(plans["teal"], rules=swapped)}, evaluation))
    assert "nats above dense teal" in found


@pytest.mark.real
def test_a_doubled_bias_is_found(bench):
    model, plans, evaluation = bench
    doubled = changed(plans["mean-error(teal)"], bias=lambda rule: None if rule.bias is None else 2.0 * rule.bias)
    assert "nats above dense mean-error(teal)" in broken(
        quality.measure(model, {"mean-error(teal)": doubled}, evaluation)
    )


def test_a_flipped_comparison_is_found(monkeypatch):
    from resting.sparsifier import masking

    right = masking.kept_input
    monkeypatch.setattr(masking, "kept_input", lambda x, cutoff, shift=0.0: x - right(x, cutoff, shift))
    found = broken(exact.measure())
    assert {"masks teal", "masks cats", "masks chess"} <= found


@pytest.mark.alone
def test_a_slow_kernel_is_found():
    assert not broken(speed.measure())

    def ignores_what_rests(weight, rule, threads=1):
        return columns(weight, type(rule)(), threads=threads)

    def waits(weight, rule, threads=1):
        product = columns(weight, rule, threads=threads)
        return lambda x: (time.sleep(0.002), product(x))[1]

    assert "kernel 0.9 over 0" in broken(speed.measure(ignores_what_rests))
    assert "kernel 0.9 over linear" in broken(speed.measure(waits))


def test_masks_do_not_depend_on_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert exact.measure() == {name: REFERENCE[name] for name in exact.measure()}
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
