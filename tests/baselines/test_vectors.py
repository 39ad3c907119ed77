"""WAS, VAR, SCAP, masks of the token and least squares, against oracles written from their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from resting.baselines.lsq import LeastSquares
from resting.baselines.max_p import MaxP
from resting.baselines.scap import Scap, peak, quantile
from resting.baselines.scap_channel import ScapChannel
from resting.baselines.statistical import Statistical
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
    LastFraction,
    Meter,
    Plan,
    Rule,
    Site,
    SparsifierError,
    fingerprint,
    in_blocks,
    masked,
    run_watched,
    slope,
)
from resting.sparsifier.fingerprint import of_model

QUICK = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def inputs_of(model, calibration, sites):
    """The dense model's inputs [tokens, in] of the sparse calibration tokens."""
    seen = {}
    run_watched(model, calibration, sites, lambda site, x: seen.setdefault(site, []).append(x.clone()))
    return {site: torch.cat(parts) for site, parts in seen.items()}


def inputs_under(plan, model, windows, site):
    """The inputs [tokens, in] of all tokens but the first of `windows` at `site`, a layer that `plan` leaves dense."""
    seen, linear = [], Decoder.of(model).linear(site)
    with plan.applied(model), torch.no_grad():
        hook = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, 1:]))
        model(windows)
        hook.remove()
    return torch.cat(seen).flatten(0, 1)


# WAS


def test_was_without_norms_and_without_a_rise_is_teal(model, calibration):
    calibrated = CalibratedModel(model, calibration)
    assert Was(0.4, power=0.0, rise=0.0).plan_for(calibrated).rules == Teal(0.4).plan_for(calibrated).rules
    greedy = {"allocation": "greedy", "step": 0.1}
    one, other = Was(0.4, power=0.0, rise=0.0, **greedy), Teal(0.4, **greedy)
    assert one.plan_at(calibrated, 0.4).rules == other.plan_at(calibrated, 0.4).rules


def test_was_scores_by_the_l1_norm_of_columns(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = Was(0.4, rise=0.0).plan_at(calibrated, 0.4)
    for site, x in inputs_of(llama, calibration, [Site(0, "q"), Site(2, "down")]).items():
        norms = torch.tensor(
            [sum(abs(float(w)) for w in column) for column in calibrated.decoder.linear(site).weight.T]
        )
        torch.testing.assert_close(plan.rules[site].scale, norms)
        assert float((x.abs() * norms <= plan.rules[site].threshold).float().mean()) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("rise", [0.0, 0.05, -0.1, 0.9])
def test_a_slope_is_a_line_whose_mean_is_the_target(llama, rise):
    decoder = Decoder.of(llama)
    targets = list(slope(decoder, 0.4, rise).values())
    used = math.copysign(min(abs(rise), 0.4), rise)
    assert targets == pytest.approx([0.4 - used, 0.4, 0.4 + used])
    ratios = in_blocks(decoder, ("q", "up", "down"), slope(decoder, 0.2, rise / 10))
    rests = sum(ratio * decoder.projection(site).elements for site, ratio in ratios.items())
    assert rests / decoder.elements == pytest.approx(0.2)


def test_blocks_of_unequal_size_keep_the_mean(llama):
    class Uneven:
        blocks, elements = 4, 100.0

        def elements_in(self, block):
            return (10.0, 20.0, 30.0, 40.0)[block]

    targets = slope(Uneven(), 0.5, 0.1)
    assert sum(t * Uneven().elements_in(i) for i, t in targets.items()) / 100 == pytest.approx(0.5)
    steps = [targets[i + 1] - targets[i] for i in range(3)]
    assert steps == pytest.approx([0.2 / 3] * 3)


def test_was_takes_the_rise_of_the_least_loss_on_windows_that_statistics_have_not_seen(llama, calibration):
    few = replace(calibration, statistics_windows=8, windows=calibration.windows[:12])
    calibrated = CalibratedModel(llama, few)
    method = Was(0.5, rises=(0.0, 0.2, 0.45), search_windows=4)
    plan = method.plan_for(calibrated)
    losses = plan.info["rise_losses"]
    assert list(losses) == ["0", "0.2", "0.45"]
    assert f"{plan.info['rise']:g}" == min(losses, key=losses.get)
    assert plan.info["rise_text_apart_from_statistics"] is True
    assert calibrated.measure(plan) == pytest.approx(0.5, abs=0.01)
    with_all = Was(0.5, rises=(0.0, 0.2), search_windows=6).plan_for(calibrated)
    assert with_all.info["rise_text_apart_from_statistics"] is False
    # A method that wraps it has the searched rise too.
    wrapped = MeanError(method).plan_at(calibrated, 0.5)
    assert wrapped.info["ratios"] == method.plan_at(calibrated, 0.5).info["ratios"]
    fixed = replace(method, rise=plan.info["rise"])
    assert wrapped.info["ratios"] == fixed.plan_at(calibrated, 0.5).info["ratios"]


def test_the_rise_does_not_depend_on_the_policy_that_asks_first(llama, calibration):
    found = []
    for order in ((AllButFirst(1), LastFraction(0.5)), (LastFraction(0.5), AllButFirst(1))):
        calibrated = CalibratedModel(llama, calibration)
        plans = [Was(0.5, rises=(0.0, 0.45)).plan_for(calibrated.under(policy)) for policy in order]
        assert plans[0].info["rise_losses"] == plans[1].info["rise_losses"]
        found.append(plans[0].info["rise_losses"])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rises": ()}, "got none"),
        ({"rise": 2.0}, "got 2.0"),
        ({"power": -1.0}, "got -1"),
        ({"search_windows": 0}, "got 0"),
    ],
)
def test_what_was_cannot_do_is_refused(fields, message):
    with pytest.raises(SparsifierError, match=message):
        Was(0.5, **fields)


# VAR and masks of the token


def test_var_has_teal_s_masks_and_the_token_s_variance(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    var, teal = Var(0.4).plan_at(calibrated, 0.4), Teal(0.4).plan_at(calibrated, 0.4)
    for site, x in inputs_of(llama, calibration, [Site(1, "o"), Site(1, "down")]).items():
        kept, plain = masked(x, var.rules[site]), masked(x, teal.rules[site])
        assert torch.equal(kept != 0, plain != 0)
        some = (plain != 0).sum(1) > 1
        torch.testing.assert_close(kept.double().var(1)[some], x.double().var(1)[some], rtol=1e-4, atol=0)


@pytest.mark.parametrize("cls", [TopP, MaxP, Statistical])
def test_thresholds_of_tokens_let_the_wanted_share_rest(cls, llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = cls(0.4).plan_at(calibrated, 0.4)
    for site, x in inputs_of(llama, calibration, [Site(0, "k"), Site(2, "down")]).items():
        assert plan.rules[site].mask == cls.name
        assert float((masked(x, plan.rules[site]) == 0).float().mean()) == pytest.approx(0.4, abs=0.01)


# SCAP


def test_scap_without_a_threshold_is_dense_for_any_centre(llama, ids):
    rules = {}
    for site in Decoder.of(llama).sites():
        weight = Decoder.of(llama).projection(site).weight.detach()
        shift = torch.randn(weight.shape[1], generator=torch.Generator().manual_seed(1)) if site.block else 0.7
        bias = weight @ shift if site.block else 0.7 * weight.sum(1)
        rules[site] = Rule(threshold=0.0, shift=shift, bias=bias)
    with Plan(rules, "scap", 0.1, 0.1, fingerprint.of_model(llama)).applied(llama, AllButFirst(0)):
        found = logits(llama, ids)
    torch.testing.assert_close(found, logits(llama, ids), rtol=1e-4, atol=1e-4)


def test_scap_around_zero_has_teal_s_masks(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    scap = Scap(0.3, mode="zero", progressive=False).plan_at(calibrated, 0.3)
    teal = Teal(0.3, modules=("gate", "up", "down")).plan_at(calibrated, 0.3)
    assert scap.rules.keys() == teal.rules.keys()
    for site, rule in scap.rules.items():
        assert (rule.shift, rule.bias) == (0.0, None)
        assert rule.threshold == pytest.approx(teal.rules[site].threshold, rel=0.005)


def test_scap_s_rule_is_its_formula(llama, calibration):
    site, weight = Site(1, "down"), llama.model.layers[1].mlp.down_proj.weight.detach()
    x = inputs_of(llama, calibration, [site])[site] + 0.3
    method = Scap(0.5, mode="median", sample=10**9)
    rule = method.rule_of(x, weight, 0.6, method.centres(x))
    mu = float(np.sort(x.numpy().ravel())[(x.numel() - 1) // 2])
    assert rule.shift == pytest.approx(mu)
    assert rule.threshold == pytest.approx(float(np.quantile(np.abs(x.double().numpy() - mu), 0.6)), rel=1e-6)
    y = masked(x, rule) @ weight.T + rule.bias
    keep = (x - mu).abs() > rule.threshold
    wanted = ((x - mu) * keep + mu).double() @ weight.double().T
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-5)


def test_scap_takes_the_centre_of_the_least_output_error(llama):
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(16, 24, generator=random)
    one_sided = torch.rand(300, 24, generator=random).pow(6)  # as after a ReLU: most are next to 0
    rule = Scap(0.5).rule_of(one_sided, weight, 0.5, Scap(0.5).centres(one_sided))
    assert rule.shift == pytest.approx(0.0, abs=2e-3)
    far = 2.0 + 0.1 * torch.randn(300, 24, generator=random)
    found = Scap(0.5).rule_of(far, weight, 0.5, Scap(0.5).centres(far))
    assert found.shift == pytest.approx(2.0, abs=0.05)
    errors = {
        mode: float(((far - (masked(far, rule) + rule.shift)) @ weight.T).norm())
        for mode in ("zero", "median", "kde")
        for rule in [Scap(0.5, mode=mode).rule_of(far, weight, 0.5, Scap(0.5, mode=mode).centres(far))]
    }
    assert float(((far - (masked(far, found) + found.shift)) @ weight.T).norm()) <= min(errors.values()) * 1.0001


def test_the_peak_of_a_density_and_quantiles():
    random = np.random.default_rng(0)
    entries = np.concatenate([random.normal(0.5, 0.1, 600), random.normal(-1.0, 0.8, 400)]).astype(np.float32)
    width = 0.5 * np.std(entries.astype(float), ddof=1) * len(entries) ** -0.2
    grid = np.linspace(entries.min(), entries.max(), 2000)
    density = np.exp(-0.5 * ((grid[:, None] - entries[None]) / width) ** 2).sum(1)
    assert peak(torch.from_numpy(entries)) == pytest.approx(float(grid[density.argmax()]), abs=1e-6)
    assert peak(torch.full((5,), 3.0)) == 3.0
    for ratio in (0.0, 0.123, 0.5, 0.999, 1.0):
        found = quantile(torch.from_numpy(np.abs(entries)), ratio)
        assert found == pytest.approx(float(np.quantile(np.abs(entries.astype(float)), ratio)), rel=1e-6)


def test_progressive_thresholds_are_set_on_what_earlier_masks_left(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = Scap(0.4, mode="zero", sites="all").plan_at(calibrated, 0.4)
    few = replace(calibration, windows=calibration.windows[: calibration.statistics_windows])
    for site in (Site(0, "o"), Site(1, "down"), Site(2, "q")):
        order = list(calibrated.decoder.sites())
        reads = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}
        before = {s: r for s, r in plan.rules.items() if (s.block, reads[s.role]) < (site.block, reads[site.role])}
        assert before or site == order[0]
        x = inputs_under(replace(plan, rules=before), llama, few.windows, site).abs()
        assert plan.rules[site].threshold == pytest.approx(float(np.quantile(x.numpy(), 0.4)), rel=1e-4)
    dense = Scap(0.4, mode="zero", sites="all", progressive=False).plan_at(calibrated, 0.4)
    assert dense.rules[Site(0, "q")].threshold == plan.rules[Site(0, "q")].threshold
    assert dense.rules[Site(2, "down")].threshold != plan.rules[Site(2, "down")].threshold


def test_scap_channel_puts_channels_means_in_the_place_of_what_rests(llama, calibration):
    plan = ScapChannel(0.4).plan_at(CalibratedModel(llama, calibration), 0.4)
    for site, x in inputs_of(llama, calibration, [Site(0, "v"), Site(1, "down")]).items():
        rule, mean = plan.rules[site], x.double().mean(0)
        torch.testing.assert_close(rule.shift.double(), mean, rtol=1e-4, atol=1e-6)
        assert float(((x - mean).abs() <= rule.threshold).double().mean()) == pytest.approx(0.4, abs=0.01)
        weight = Decoder.of(llama).projection(site).weight.detach().double()
        torch.testing.assert_close(rule.bias.double(), weight @ mean, rtol=1e-4, atol=1e-6)


def test_scap_has_no_rule_without_inputs_and_refuses_experts(calibration):
    with pytest.raises(SparsifierError, match="layer by layer"):
        Scap(0.3).rule(Site(0, "down"), None, 0.3)
    from decoders import decoder_of

    with pytest.raises(SparsifierError, match="experts"):
        Scap(0.3).fit(decoder_of("mixtral"), calibration)


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
