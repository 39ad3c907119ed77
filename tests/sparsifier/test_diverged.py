"""Numbers that are not finite, or beyond a dtype, end in one error that says where."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import build

from resting.baselines.chess import Chess
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.baselines.wina import Wina
from resting.method.fisher import fisher_bias
from resting.method.mean_error import MeanError
from resting.method.objectives import OBJECTIVES
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import (
    CalibratedModel,
    Decoder,
    DivergedError,
    Histogram,
    Moments,
    Plan,
    Rule,
    Site,
    SparsifierError,
    Statistics,
    check_logits,
    fingerprint,
    folded_bias,
)
from resting.sparsifier.low_rank import Factors


def scaled(factor: float, dtype: torch.dtype = torch.float32, everything: bool = False):
    model = build("llama")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name or everything:
                parameter.mul_(factor)
    return model.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_that_are_not_finite_are_said_to_be(dtype):
    assert issubclass(DivergedError, SparsifierError)
    model = scaled(1e18, dtype, everything=True)
    with torch.no_grad():
        assert not torch.isfinite(model(torch.arange(8)[None]).logits).all()
    with pytest.raises(DivergedError, match=f"logits of this LlamaForCausalLM are NaN or infinite in {str(dtype)[6:]}"):
        check_logits(model)


@pytest.mark.parametrize("method", [Teal(0.5), Wina(0.5), RSparse(0.5), MeanError(Teal(0.5)), Chess(0.25)])
def test_activations_that_overflow_name_the_site(method, calibration):
    with pytest.raises(DivergedError, match=r"at site 0\.\w+ of the dense model on the calibration text"):
        method.fit(scaled(1e25), calibration)


@pytest.mark.parametrize("exponent", [-120, -60, -33, 0, 33, 60, 126])
def test_quantiles_over_the_whole_range_of_fp32(exponent):
    """Against numpy; magnitudes above 2^32 and below 2^-32 were counted as those."""
    x = torch.rand(20000, generator=torch.Generator().manual_seed(0)) + 0.5
    x = (x.double() * 2.0**exponent).float()
    histogram = Histogram()
    histogram.add(x)
    for ratio in (0.1, 0.5, 0.9):
        assert histogram.quantile(ratio) == pytest.approx(float(np.quantile(x.numpy(), ratio)), rel=0.004)
    assert histogram.quantile(1.0) >= float(x.max())


def test_thresholds_of_tiny_and_of_huge_activations_leave_the_share_that_was_asked_for(calibration):
    """Inputs of down are scaled by a power of two, and so is the threshold there."""
    thresholds = {}
    for exponent in (-40, 0, 40):
        model = build("llama")
        with torch.no_grad():
            for block in model.model.layers:
                block.mlp.up_proj.weight.mul_(2.0**exponent)
                block.mlp.down_proj.weight.mul_(2.0**-exponent)
        plan = Teal(target=0.5).fit(model, calibration)
        thresholds[exponent] = [rule.threshold for site, rule in plan.rules.items() if site.role == "down"]
    for exponent in (-40, 40):
        assert [t * 2.0**-exponent for t in thresholds[exponent]] == pytest.approx(thresholds[0], rel=1e-3)


def test_moments_refuse_what_they_cannot_sum():
    for value in (math.nan, math.inf, 1e30):
        with pytest.raises(DivergedError, match="an activation, or its square, is NaN or infinite"):
            Moments().add(torch.tensor([[1.0, value]]))


def test_moments_of_half_precision_do_not_overflow():
    """The square of 60,000 is beyond float16, and a sum of 4,096 of them too."""
    moments = Moments()
    moments.add(torch.full((4096, 2), 60000.0, dtype=torch.float16))
    assert moments.mean_magnitude.tolist() == [60000.0, 60000.0]
    assert moments.root_mean_square.tolist() == pytest.approx([60000.0, 60000.0], rel=1e-6)


def test_a_sparse_model_that_diverges_is_not_measured(llama, calibration):
    """NaN counts as read: its byte sparsity would be that of no decode step."""
    rules = {Site(block, "down"): Rule(threshold=0.01, bias=torch.full((32,), 3e38)) for block in range(3)}
    plan = Plan(rules, "loud", 0.5, 0.5, fingerprint.of_model(llama))
    with pytest.raises(DivergedError, match=r"hidden states of the model under loud at 0\.5 are NaN or infinite"):
        CalibratedModel(llama, calibration).measure(plan)


def test_weights_whose_norms_overflow_are_named(llama, calibration):
    statistics = Statistics.collect(llama, calibration)
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1e25)
    with pytest.raises(DivergedError, match=r"column norms of the weight at 1\.up are NaN, or beyond"):
        statistics.column_norms(Site(1, "up"))


def test_products_and_decompositions_of_such_weights(llama):
    with torch.no_grad():
        llama.model.layers[1].mlp.up_proj.weight.mul_(1e25)
    with pytest.raises(DivergedError, match=r"bias at 1\.up is NaN, or beyond the range of float32"):
        folded_bias(Decoder.of(llama), Site(1, "up"), torch.full((32,), 1e25))
    with pytest.raises(DivergedError, match="no singular value decomposition"):
        Factors().low_rank(torch.tensor([[1.0, math.nan], [0.0, 1.0]]), 1)


def test_labels_are_not_drawn_from_what_is_no_distribution(llama, calibration):
    plan = Teal(target=0.5).fit(llama, calibration)
    with torch.no_grad():
        llama.lm_head.weight.mul_(1e39)
    calibrated = CalibratedModel(llama, calibration)
    with pytest.raises(DivergedError, match="logits of the dense model on the calibration text are NaN or infinite"):
        fisher_bias(calibrated, plan, calibrated.decoder.sites(("down",)), windows=1)


def test_a_last_step_that_diverges_gives_no_plan(llama, calibration, monkeypatch):
    """The loss is taken before the step: what the last one did shows in no loss."""
    monkeypatch.setitem(OBJECTIVES, "hidden-mse", lambda model, dense, sparse: (1.0, torch.full_like(sparse, math.nan)))
    short = {"steps": 1, "batch": 2, "window": 16, "warmup": 1}
    method = Spontaneous(Teal(target=0.5), objective="hidden-mse", **short)
    with pytest.raises(DivergedError, match=r"alpha/0\.down became NaN or infinite in training: lower the learning"):
        method.fit(llama, calibration)


def test_greedy_compares_no_errors_that_are_not_finite(llama, calibration, monkeypatch):
    method = replace(Teal(target=0.5), allocation="greedy", step=0.2)
    calibrated = CalibratedModel(llama, calibration)
    method.statistics(calibrated)
    with torch.no_grad():
        llama.model.layers[1].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(DivergedError, match="the error of block 1 is nan when some of its inputs rest"):
        method.ratios(calibrated, 0.5)
