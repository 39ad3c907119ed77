"""Spontaneous neurons and the mean-error control, on tiny models."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from resting.baselines.teal import Teal
from resting.method.compensation import Compensation
from resting.method.mean_error import MeanError
from resting.method.objectives import forward_kl
from resting.method.schedule import Schedule, cut
from resting.method.spontaneous import Spontaneous
from resting.method.training import _average, train
from resting.sparsifier import (
    ACT,
    CalibratedModel,
    Calibration,
    DecodeOnly,
    DivergedError,
    Meter,
    Rule,
    Site,
    Sparsifier,
    SparsifierError,
    TargetUnreachableError,
)
from resting.sparsifier.logits import final_hidden, logits

SHORT = {"steps": 6, "batch": 4, "window": 16, "warmup": 1, "match_every": 2, "learning_rate": 1e-2}


def spon(target=0.5, **changes):
    return Spontaneous(Teal(target=target), **(SHORT | changes))


def run(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def schedule(**changes):
    values = {"average_from": 0.0, "match": True, "seed": 0} | SHORT | changes
    return Schedule(**values)


def test_zero_alpha_is_the_bare_sparsifier_bit_for_bit(model, ids, calibration):
    plan = Teal(target=0.5).fit(model, calibration)
    with plan.applied(model):
        expected = run(model, ids)
    with plan.applied(model) as layers:
        for layer in layers.values():
            layer.spontaneous = torch.zeros(layer.linear.in_features)
        assert torch.equal(run(model, ids), expected)


@pytest.mark.parametrize("role", ["q", "o", "gate", "down"])
def test_folding_is_exact_at_every_site(llama, ids, calibration, role):
    """W (S(x) + alpha) = W S(x) + b with b = W alpha, on all sparse tokens."""
    calibrated = CalibratedModel(llama, calibration)
    method = spon(sites=(role,))
    base = method.inner.plan_for(calibrated)
    g = torch.Generator().manual_seed(0)
    sites = calibrated.decoder.sites((role,))
    alphas = {s: 0.1 * torch.randn(calibrated.decoder.linear(s).in_features, generator=g) for s in sites}
    with base.applied(llama) as layers:
        for site, alpha in alphas.items():
            layers[site].spontaneous = alpha
        expected = run(llama, ids)
    biases = {s: calibrated.decoder.linear(s).weight.detach() @ a for s, a in alphas.items()}
    with method.with_biases(base, biases).applied(llama):
        torch.testing.assert_close(run(llama, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_folded_model_has_the_bias_on_every_token(llama, ids, calibration):
    plan = spon().fit(llama, calibration)
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    with plan.applied(llama):
        partly = run(llama, ids)
    with plan.folded(llama) as masks:
        assert llama.model.layers[0].mlp.down_proj.bias is not None
        with masks.applied(llama):
            everywhere = run(llama, ids)
    assert not torch.equal(partly[:, 0], everywhere[:, 0])
    assert llama.model.layers[0].mlp.down_proj.bias is None
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())


def test_the_gradient_of_the_divergence(llama, ids):
    with torch.no_grad():
        dense = final_hidden(llama, ids).flatten(0, 1)
    sparse = (dense + 0.3 * torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    log_p, log_q = (logits(llama, h).log_softmax(-1) for h in (dense, sparse))
    expected = F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")
    (slope,) = torch.autograd.grad(expected, sparse)
    loss, gradient = forward_kl(llama, dense, sparse)
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient, slope, rtol=1e-4, atol=1e-7)
    assert forward_kl(llama, dense, dense)[0] == 0.0


def test_the_gradient_of_alpha_against_finite_differences(llama, ids, calibration):
    """Of the last block: masks of later layers would jump when an input crosses a threshold."""
    plan = Teal(target=0.5).fit(llama, calibration)
    llama = llama.double()
    with torch.no_grad():
        dense = final_hidden(llama, ids).flatten(0, 1)
    site = Site(2, "down")
    with plan.applied(llama) as layers:
        alpha = torch.zeros(48, dtype=torch.float64, requires_grad=True)
        layers[site].spontaneous = alpha

        def kl() -> torch.Tensor:
            log_p, log_q = (logits(llama, h).log_softmax(-1) for h in (dense, final_hidden(llama, ids).flatten(0, 1)))
            return F.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

        hidden = final_hidden(llama, ids)
        with torch.no_grad():
            _, gradient = forward_kl(llama, dense, hidden.flatten(0, 1))
        hidden.backward(gradient.view_as(hidden))
        step = 3e-3
        for i in (0, 7, 31):
            nudge = torch.zeros(48, dtype=torch.float64)
            nudge[i] = step
            with torch.no_grad():
                layers[site].spontaneous = alpha + nudge
                up = float(kl())
                layers[site].spontaneous = alpha - nudge
                down = float(kl())
            assert float(alpha.grad[i]) == pytest.approx((up - down) / (2 * step), rel=2e-2, abs=1e-6)


def test_training_at_sparsity_zero_leaves_alpha_at_zero(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    method = spon(target=0.0)
    plan = method.plan_at(calibrated, 0.0)
    compensation = Compensation.of(calibrated.decoder, calibrated.decoder.sites(("down",)), plan, calibrated.device)
    state = train(calibrated, compensation, lambda n: method.plan_at(calibrated, n), 0.0, 0.0, schedule(match=False))
    assert max(state.losses) < 1e-10
    assert all(torch.equal(a, torch.zeros_like(a)) for a in state.parameters.values())


def test_training_helps_and_freezes_the_weights(llama, calibration):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    calibrated = CalibratedModel(llama, calibration)
    method = spon(steps=150, batch=16, learning_rate=3e-3, match=False)

    def divergence(plan):
        with torch.no_grad():
            dense = final_hidden(llama, calibration.windows).flatten(0, 1)
            with plan.applied(llama):
                return forward_kl(llama, dense, final_hidden(llama, calibration.windows).flatten(0, 1))[0]

    assert divergence(method.plan_for(calibrated)) < 0.95 * divergence(method.inner.plan_for(calibrated))
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())


def test_two_trainings_are_the_same_bit_for_bit_and_seeds_differ(llama, calibration):
    a, b, c = (spon(seed=s).fit(llama, calibration).rules[Site(1, "down")].bias for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_rates_rise_in_a_line_and_fall_along_a_cosine():
    found = schedule(steps=12, warmup=2, decay="cosine")
    assert [found.share(step) for step in (0, 1, 2, 7)] == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert found.share(11) == pytest.approx(0.5 + 0.5 * math.cos(0.9 * math.pi))
    assert schedule(steps=12, warmup=2).share(11) == 1.0
    names = ("alpha/0.q", "gain/0.q", "threshold/0.q", "channel/0.q", "update/0.q")
    different = schedule(learning_rate=1.0, threshold_rate=2.0, channel_rate=3.0, update_rate=4.0)
    assert [different.rate(name) for name in names] == [1.0, 1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("thresholds", ["no", "site", "both"])
def test_a_killed_training_continues_to_the_same_result(tmp_path, llama, calibration, thresholds):
    whole = spon(thresholds=thresholds).fit(llama, calibration)

    class Killed(Exception):
        pass

    def die(stage, done, total, note):
        if (stage, done) == ("train", 5):
            raise Killed

    with pytest.raises(Killed):
        spon(thresholds=thresholds).fit(llama, calibration, folder=tmp_path, on_progress=die)
    steps = []
    resumed = spon(thresholds=thresholds).fit(
        llama, calibration, folder=tmp_path, on_progress=lambda s, d, t, n: steps.append(d) if s == "train" else None
    )
    assert steps[0] == 5  # steps 1 to 4 were in the checkpoint
    assert resumed.info == whole.info
    for site, rule in whole.rules.items():
        assert resumed.rules[site].same_mask(rule)
        assert rule.bias is None or torch.equal(resumed.rules[site].bias, rule.bias)


def test_a_diverging_loss_is_one_clear_error(llama, calibration, monkeypatch):
    losses = iter([0.1, 0.1, float("nan")])
    diverging = {"forward-kl": lambda model, dense, sparse: (next(losses), sparse.detach())}
    monkeypatch.setattr("resting.method.spontaneous.OBJECTIVES", diverging)
    with pytest.raises(DivergedError, match=r"training loss became nan at step 2: lower the learning rate"):
        spon().fit(llama, calibration)
    assert all(p.requires_grad for p in llama.parameters())


def test_byte_sparsity_is_matched_with_the_biases_in(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    for method in (Teal(target=0.5), MeanError(Teal(target=0.5)), spon(steps=20)):
        plan = method.plan_for(calibrated)
        assert calibrated.measure(plan) == pytest.approx(0.5, abs=0.004), method.label


def test_without_matching_the_thresholds_stay(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    base, plan = Teal(target=0.5).plan_for(calibrated), spon(match=False).plan_for(calibrated)
    assert all(plan.rules[site].threshold == rule.threshold for site, rule in base.rules.items())


def test_mean_error_is_the_mean_of_what_is_dropped(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    base = Teal(target=0.5).plan_for(calibrated)
    plan = MeanError(Teal(target=0.5), sites=("o", "down")).plan_for(calibrated)
    inputs = []
    handle = llama.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0][:, 1:]))
    with torch.no_grad():
        llama(calibration.windows[:16])
    handle.remove()
    x = torch.cat(inputs).flatten(0, 1).double()
    dropped = (x * (x.abs() <= base.rules[Site(1, "o")].threshold)).mean(0)
    expected = llama.model.layers[1].self_attn.o_proj.weight.detach().double() @ dropped
    torch.testing.assert_close(plan.rules[Site(1, "o")].bias.double(), expected, rtol=1e-4, atol=1e-6)
    assert plan.rules[Site(1, "q")].bias is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ("nose",)}, "sites must be some of q, k, v, o, gate, up, down, got nose"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"average_from": 1.0}, r"average_from must be in \[0, 1\)"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(SparsifierError, match=message):
        spon(**changes)


def test_a_window_longer_than_the_text(llama, calibration):
    with pytest.raises(SparsifierError, match="must be from 2 to the 32 tokens of a calibration window, got 40"):
        spon(window=40).fit(llama, calibration)


def test_meter_without_tokens_says_so():
    with pytest.raises(SparsifierError, match="no sparse token was seen"):
        Meter().byte_sparsity()


class Gates(Sparsifier):
    """CATS in three lines: the activated gate, and no mask at any linear layer."""

    name = "gates"
    roles = (ACT,)

    def rule(self, site, statistics, ratio):
        return Rule(threshold=statistics[site].quantile(ratio))


def test_spon_over_a_method_that_masks_only_gates(llama, ids, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = Spontaneous(Gates(target=0.3), **SHORT).plan_for(calibrated)
    assert plan.method == "spon(gates)"
    assert plan.rules[Site(0, "down")].bias is not None
    assert calibrated.measure(plan) == pytest.approx(0.3, abs=0.01)


def test_mean_error_where_nothing_is_masked_says_so(llama, calibration):
    with pytest.raises(SparsifierError, match="gates masks no input of down"):
        MeanError(Gates(target=0.3)).fit(llama, calibration)


def test_a_ceiling_is_an_error_with_its_figure(llama, calibration):
    with pytest.raises(
        TargetUnreachableError, match=r"byte sparsity 0\.9 is above this method's ceiling of 0\.400"
    ):  # up and down are 3,072 of 7,680
        Gates(target=0.9).fit(llama, calibration)


def test_checkpoints_tell_trainings_apart(tmp_path, llama, calibration):
    class Shifted(Teal):
        """Same label, another parameter."""

        def spec(self):
            return super().spec() | {"last": self.last}

    plans = []
    for last in (False, True):
        inner = Shifted(target=0.5)
        inner.last = last
        Spontaneous(inner, **SHORT).fit(llama, calibration, folder=tmp_path)
        plans.append(len(list((tmp_path / "training").iterdir())))
    assert plans == [1, 2]


def test_checkpoints_tell_dtypes_apart(tmp_path, llama, calibration):
    spon().fit(llama, calibration, folder=tmp_path)
    spon().fit(llama.bfloat16(), calibration, folder=tmp_path)
    assert len(list((tmp_path / "training").iterdir())) == 2


def test_without_matching_the_plan_says_what_it_measures(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = spon(match=False, steps=30).plan_for(calibrated)
    assert plan.info["matched"] == calibrated.measure(plan) != Teal(target=0.5).plan_for(calibrated).info["matched"]


@pytest.mark.parametrize("outer", [Spontaneous, MeanError])
def test_a_compensation_of_a_compensation_is_refused(outer):
    with pytest.raises(SparsifierError, match=r"wraps a sparsifier, not what adds biases to one: mean-error\(teal\)"):
        outer(MeanError(Teal(target=0.5)))


def test_training_inside_no_grad(llama, calibration):
    with torch.no_grad():
        assert spon().fit(llama, calibration).info["losses"]


def test_pieces_begin_with_bos_where_windows_do():
    windows = torch.arange(40).view(2, 20) % 19 + 5
    assert cut(Calibration(windows), 5)[0].tolist() == windows.view(8, 5).tolist()
    windows[:, 0] = 1
    pieces, begin = cut(Calibration(windows), 5)
    assert begin == 1
    assert pieces.shape == (8, 5)
    assert (pieces[:, 0] == 1).all()
    assert torch.equal(pieces[:4, 1:].flatten(), windows[0, 1:17])


def test_training_for_a_policy_that_leaves_windows_dense(llama, calibration):
    assert spon().fit(llama, replace(calibration, tokens=DecodeOnly())).info["losses"][0] > 0


def test_an_average_of_iterates_is_rounded_as_when_results_were_measured():
    """`lerp_`, which is shorter, moved perplexities of `baselines` by up to 1 %."""
    iterates = torch.randn(9, 1000, generator=torch.Generator().manual_seed(0))
    average, expected = torch.zeros(1000), torch.zeros(1000)
    for count, iterate in enumerate(iterates, 1):
        _average(average, iterate, count)
        expected = expected + (iterate - expected) / count
    assert torch.equal(average, expected)
    torch.testing.assert_close(average, iterates.mean(0), rtol=0, atol=1e-6)
