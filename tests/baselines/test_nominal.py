"""The protocol "nominal": the ratio of the paper at every site, the suite's text and policy, and nothing is matched."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resting.baselines.cats import Cats
from resting.baselines.griffin import Griffin
from resting.baselines.larosa import LaRoSA
from resting.baselines.static_neurons import StaticNeurons
from resting.baselines.teal import Teal
from resting.method.mean_error import MeanError
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import CalibratedModel, DecodeOnly, SparsifierError, Statistic

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


@pytest.mark.parametrize("cls", [StaticNeurons, Griffin])
def test_the_share_of_neurons_is_the_target(cls, llama, calibration):
    calibrated = CalibratedModel(llama, replace(calibration, tokens=DecodeOnly(16)))
    method = cls(0.25, protocol="nominal")
    plan = method.plan_for(calibrated)
    assert set(plan.info["ratios"].values()) == {0.25}
    assert "matched" not in plan.info
    share, fitted = calibrated.measure(plan), cls(0.25).plan_for(calibrated)
    assert share < 0.2 < calibrated.measure(fitted)  # attention stays dense


def test_larosa_s_shares_are_its_authors_and_nothing_is_matched(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    nominal, matched = LaRoSA(0.4, protocol="nominal"), LaRoSA(0.4)
    plan = nominal.plan_for(calibrated)
    assert (nominal.label, matched.label) == ("larosa, nominal", "larosa")
    assert "matched" not in plan.info
    assert {plan.info["ratios"][f"0.{role}"] for role in "qo"} == {0.32, 0.48}
    assert plan.nominal == 0.4 < matched.plan_for(calibrated).nominal


def test_names_do_not_depend_on_what_was_fitted_before(llama, calibration):
    for first in (LaRoSA(0.3), LaRoSA(0.3, topk=False)):
        calibrated = CalibratedModel(llama, calibration)
        first.plan_for(calibrated)
        assert LaRoSA(0.3).plan_for(calibrated).transform.name == "larosa"
    labels = [LaRoSA(0.3, topk=topk, adapters=of).label for topk in (True, False) for of in ("counted", "free")]
    assert len(set(labels)) == 4
