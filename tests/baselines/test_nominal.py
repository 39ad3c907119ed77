"""The protocol "nominal": the ratio of the paper at every site, the suite's text and policy, and nothing is matched."""

from __future__ import annotations

import pytest
import torch

from resting.baselines.cats import Cats
from resting.baselines.teal import Teal
from resting.method.mean_error import MeanError
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import CalibratedModel, SparsifierError, Statistic

FEW = {"steps": 2, "batch": 2, "window": 16, "match_every": 1, "warmup": 1}


def test_thresholds_are_the_quantiles_at_the_target(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    method = Teal(0.5, protocol="nominal")
    plan, statistics = method.plan_for(calibrated), calibrated.statistics(frozenset({Statistic.HISTOGRAM}))
    assert method.label == "teal, nominal"
    assert plan.nominal == 0.5
    assert "matched" not in plan.info
    assert len(plan.rules) == 7 * calibrated.decoder.blocks
    for site, rule in plan.rules.items():
        assert rule.threshold == statistics[site].quantile(0.5)


def test_the_ratio_is_that_of_the_sites_a_method_masks(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    nominal = Cats(0.5, protocol="nominal").plan_for(calibrated)
    # Half of the rows of up and the columns of down: less than half of all bytes.
    assert calibrated.measure(nominal) < 0.4


def test_spon_at_those_thresholds(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    inner = Teal(0.5, protocol="nominal")
    method = Spontaneous(inner, match=False, **FEW)
    assert method.label == "spon(teal, nominal)"
    plan, bare = method.plan_for(calibrated), inner.plan_for(calibrated)
    for site, rule in bare.rules.items():
        assert plan.rules[site].threshold == rule.threshold
    biases = [rule.bias for site, rule in plan.rules.items() if site.role == "down"]
    assert all(bias is not None and torch.isfinite(bias).all() for bias in biases)


@pytest.mark.parametrize("wrap", [MeanError, lambda inner: Spontaneous(inner, **FEW)])
def test_what_matches_bytes_is_refused_over_it(wrap):
    with pytest.raises(SparsifierError, match=r"keeps the measured bytes at the target.*match = false"):
        wrap(Teal(0.5, protocol="nominal"))


def test_other_protocols_are_refused():
    with pytest.raises(SparsifierError, match="must be common, nominal or original, got 'theirs'"):
        Teal(0.5, protocol="theirs")
