"""WAS, VAR, SCAP and masks of the token, against oracles written from their formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from inputs import inputs_of, inputs_under, logits

from resting.baselines.max_p import MaxP
from resting.baselines.scap import Scap, peak, quantile
from resting.baselines.scap_channel import ScapChannel
from resting.baselines.statistical import Statistical
from resting.baselines.teal import Teal
from resting.baselines.top_p import TopP
from resting.baselines.var import Var
from resting.baselines.was import Was
from resting.method.mean_error import MeanError
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    Decoder,
    LastFraction,
    Plan,
    Rule,
    Site,
    SparsifierError,
    fingerprint,
    in_blocks,
    masked,
    slope,
)

QUICK = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1}


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
