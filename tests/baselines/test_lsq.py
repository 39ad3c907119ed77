"""Least squares, and what wraps the methods of scores and masks, against oracles written from their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from inputs import inputs_of, inputs_under, logits

from resting.baselines.lsq import LeastSquares
from resting.baselines.scap import Scap
from resting.baselines.scap_channel import ScapChannel
from resting.baselines.teal import Teal
from resting.baselines.top_p import TopP
from resting.baselines.var import Var
from resting.baselines.was import Was
from resting.method.compensation import Compensation
from resting.method.fisher import FisherError
from resting.method.mean_error import MeanError
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    Decoder,
    Meter,
    Plan,
    Rule,
    Site,
    SparsifierError,
    masked,
)
from resting.sparsifier.fingerprint import of_model

QUICK = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1}


# Least squares


def fitted(model, calibration, **more):
    """The plan at the masks of `inner`, not moved to other bytes."""
    calibrated = CalibratedModel(model, calibration)
    method = LeastSquares(Teal(0.5), **more)
    base = method.inner.plan_for(calibrated)
    return base, method._replaced(method.plan_at(calibrated, base.nominal), method._replacements(calibrated, base))


def test_lsq_is_its_closed_form_and_no_worse_than_a_bias(llama, calibration):
    base, plan = fitted(llama, calibration, ridge=0.0)
    _, damped = fitted(llama, calibration, ridge=0.05)
    decoder = Decoder.of(llama)
    for site, x in inputs_of(llama, calibration, [Site(0, "k"), Site(2, "down")]).items():
        x, weight = x.double(), decoder.projection(site).weight.detach().double()
        kept = x * (x.abs() > base.rules[site].threshold)
        with_one = torch.cat([kept, torch.ones(len(x), 1)], 1).double()
        best = torch.linalg.lstsq(with_one, x @ weight.T).solution
        rule = plan.rules[site]
        found = kept @ rule.weight.double().T + rule.bias.double()
        torch.testing.assert_close(found, with_one @ best, rtol=1e-3, atol=1e-4)
        centred, moved = x - x.mean(0), kept - kept.mean(0)
        gram = moved.T @ moved
        gram += 0.05 * gram.diagonal().mean() * torch.eye(len(gram))
        error = {
            "bare": kept @ weight.T,
            "bias": kept @ weight.T + (x - kept).mean(0) @ weight.T,
            "lsq": found,
        }
        squared = {name: float((x @ weight.T - y).square().sum()) for name, y in error.items()}
        assert squared["lsq"] < squared["bias"] <= squared["bare"]
        ridged = weight + weight @ (centred - moved).T @ moved @ torch.linalg.inv(gram)
        torch.testing.assert_close(damped.rules[site].weight.double(), ridged, rtol=1e-3, atol=1e-4)


def test_lsq_without_sparsity_or_with_an_endless_ridge_changes_nothing(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = LeastSquares(Teal(0.0), ridge=0.0).plan_for(calibrated)
    assert all(rule.weight is None for rule in plan.rules.values())
    base, stiff = fitted(llama, calibration, ridge=float("inf"))
    for site, rule in stiff.rules.items():
        assert torch.equal(rule.weight, calibrated.decoder.projection(site).weight)
    mean_error = MeanError(Teal(0.5), sites=LeastSquares(Teal(0.5)).sites).plan_for(calibrated)
    for site, rule in stiff.rules.items():
        torch.testing.assert_close(rule.bias, mean_error.rules[site].bias, rtol=1e-3, atol=1e-5)
    nothing = {site: Rule(threshold=0.0) for site in base.rules}
    assert not LeastSquares(Teal(0.5))._replacements(calibrated, replace(base, rules=nothing, target=0.0))


def test_lsq_without_bias_and_over_a_method_with_biases(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    inner = ScapChannel(0.5)
    base = inner.plan_for(calibrated)
    for centred in (True, False):
        method = LeastSquares(inner, ridge=0.0, centred=centred)
        found = method._replacements(calibrated, base)
        for site, x in inputs_of(llama, calibration, [Site(1, "q"), Site(0, "down")]).items():
            x, weight = x.double(), calibrated.decoder.projection(site).weight.detach().double()
            kept = masked(x, base.rules[site])
            wanted = x @ weight.T - (0.0 if centred else base.rules[site].bias.double())
            given = torch.cat([kept, torch.ones(len(x), int(centred))], 1).double()
            best = given @ torch.linalg.lstsq(given, wanted).solution
            rule = found[site]
            y = kept @ rule.weight.double().T + (rule.bias.double() if centred else 0.0)
            torch.testing.assert_close(y, best, rtol=1e-3, atol=1e-3)


def test_lsq_of_the_stream_sees_what_earlier_layers_left(llama, calibration):
    base, plan = fitted(llama, calibration, mode="stream", ridge=0.0)
    few = calibration.windows[: calibration.statistics_windows]
    site = Site(2, "down")
    x = inputs_of(llama, calibration, [site])[site].double()
    before = {s: r for s, r in plan.rules.items() if s != site}
    seen = inputs_under(replace(plan, rules=before), llama, few, site)
    kept = masked(seen, base.rules[site]).double()
    given = torch.cat([kept, torch.ones(len(x), 1)], 1).double()
    best = torch.linalg.lstsq(given, x @ llama.model.layers[2].mlp.down_proj.weight.double().T).solution
    rule = plan.rules[site]
    found = kept @ rule.weight.double().T + rule.bias.double()
    torch.testing.assert_close(found, given @ best, rtol=1e-2, atol=1e-3)


def test_lsq_refuses_what_it_cannot_replace(llama, calibration):
    from resting.baselines.cats import Cats
    from resting.baselines.rsparse import RSparse

    with pytest.raises(SparsifierError, match="masks no input of"):
        LeastSquares(Cats(0.2)).fit(llama, calibration)
    with pytest.raises(SparsifierError, match="stands in for the weights at"):
        LeastSquares(RSparse(0.3, rho=0.6)).fit(llama, calibration)
    for fields, message in (({"ridge": -1.0}, "ridge must be at least 0"), ({"mode": "x"}, "local or stream")):
        with pytest.raises(SparsifierError, match=message):
            LeastSquares(Teal(0.5), **fields)
    meter = Meter()
    plan = LeastSquares(Scap(0.3, sample=500)).fit(llama, calibration)  # attention is dense there
    assert {site.role for site, rule in plan.rules.items() if rule.weight is not None} == {"gate", "up", "down"}
    with plan.applied(llama, meter=meter):
        logits(llama, calibration.windows[:4])
    assert meter.byte_sparsity() == pytest.approx(0.3, abs=0.03)


# Wrapped by others


@pytest.mark.parametrize(
    "inner", [Was(0.4, rise=0.02), Scap(0.3), Var(0.4), ScapChannel(0.4), TopP(0.4)], ids=lambda m: m.label
)
def test_spon_wraps_them_at_equal_bytes(inner, llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = Spontaneous(inner, **QUICK).plan_for(calibrated)
    assert calibrated.measure(plan) == pytest.approx(inner.target, abs=0.01)
    own = inner.plan_at(calibrated, plan.nominal).rules
    for site, rule in plan.rules.items():
        assert (rule.mask, rule.rescale) == (own[site].mask, own[site].rescale)
        if site.role == "down":
            assert not torch.equal(rule.bias, torch.zeros(32) if own[site].bias is None else own[site].bias)


def test_spon_refined_trains_was_and_refuses_other_masks(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    refined = {"thresholds": "site", "smoothing": 1.0, **QUICK}
    plan = Spontaneous(Was(0.4, rise=0.02), **refined).plan_for(calibrated)
    assert calibrated.measure(plan) == pytest.approx(0.4, abs=0.02)
    for inner, message in ((Scap(0.3, mode="median"), "no threshold on"), (Var(0.4), "rescaled"), (TopP(0.4), "top-p")):
        with pytest.raises(SparsifierError, match=message):
            Spontaneous(inner, **refined).plan_for(calibrated)


def test_closed_forms_over_a_method_with_biases_take_them_into_account(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    inner = ScapChannel(0.4)
    base = inner.plan_for(calibrated)
    site = Site(1, "down")
    x, weight = (
        inputs_of(llama, calibration, [site])[site].double(),
        llama.model.layers[1].mlp.down_proj.weight.double(),
    )
    left = ((x - masked(x, base.rules[site])) @ weight.T).mean(0)
    plan = MeanError(inner).plan_for(calibrated)
    torch.testing.assert_close(plan.rules[site].bias.double(), left, rtol=1e-3, atol=1e-4)
    fisher = FisherError(inner, windows=4).plan_for(calibrated)
    assert torch.isfinite(fisher.rules[site].bias).all()
    with pytest.raises(SparsifierError, match="start must be zero"):
        Spontaneous(inner, start="mean-error", **QUICK).plan_for(calibrated)


def test_trained_activations_are_folded_through_the_weights_that_sparse_tokens_read(llama, ids):
    decoder, site = Decoder.of(llama), Site(1, "down")
    weight = 0.5 * decoder.projection(site).weight.detach()
    plan = Plan({site: Rule(threshold=0.05, weight=weight)}, "x", 0.1, 0.1, of_model(llama))
    compensation = Compensation.of(decoder, [site], plan, torch.device("cpu"))
    alpha = 0.3 * torch.randn(48, generator=torch.Generator().manual_seed(4))
    compensation.parameters[f"alpha/{site}"].data[0] = alpha
    folded = compensation.compensated(plan, compensation.parameters)
    torch.testing.assert_close(folded.rules[site].bias, weight @ alpha)
    with torch.no_grad():
        with plan.applied(llama) as layers:
            compensation.attach(plan, layers)
            trained = llama(ids).logits
        with folded.applied(llama):
            torch.testing.assert_close(llama(ids).logits, trained, rtol=1e-4, atol=1e-5)


def test_without_masks_replaced_weights_stay_with_their_bias(llama, calibration, ids):
    plan = LeastSquares(Teal(0.4), sites=("down",)).plan_for(CalibratedModel(llama, calibration))
    down = [layer.mlp.down_proj for layer in llama.model.layers]

    def by_hand(module, args, output):
        rule = plan.rules[Site(down.index(module), "down")]
        return torch.nn.functional.linear(args[0], rule.weight, rule.bias)

    with plan.biases_only().applied(llama, AllButFirst(0)):
        found = logits(llama, ids)
    handles = [module.register_forward_hook(by_hand) for module in down]
    wanted = logits(llama, ids)
    for handle in handles:
        handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
