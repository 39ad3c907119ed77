"""Refined thresholds: the estimated derivatives against calculus, and descent that trades no bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.method.compensation import Compensation
from resting.method.masks import TrainedMask, scaled
from resting.method.spontaneous import Spontaneous
from resting.method.thresholds import ConstantBytes
from resting.sparsifier import CalibratedModel, Plan, PlanError, Rule, Site, SparsifierError
from resting.sparsifier.masking import masked

SHORT = {"steps": 12, "batch": 8, "window": 16, "warmup": 1, "match_every": 3, "threshold_rate": 0.05}


def density(t):
    return math.exp(-t * t / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("t", [0.3, 0.7, 1.2])
@pytest.mark.parametrize("shape", [(), (4,)])
def test_the_slopes_of_normal_inputs(t, shape):
    """Of the mean of |x| 1{|x| > t e^delta}, -2 t^2 phi(t); of the share that is read, -2 t phi(t)."""
    x = torch.randn(200_000, 4, generator=torch.Generator().manual_seed(0))
    delta = nn.Parameter(torch.zeros(shape))
    mask = TrainedMask(Rule(threshold=t), (delta,), 0.25, smoothing=0.0)
    (mask(x) * x.sign()).sum(1).mean().backward()
    channels = 4 if shape == () else 1
    torch.testing.assert_close(delta.grad, torch.full(shape, channels * -2 * t * t * density(t)), rtol=0.05, atol=0)
    expected = torch.full(shape, channels * 0.25 * -2 * t * density(t))
    torch.testing.assert_close(mask.byte_slope, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("t", [0.5, 0.7, 1.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.2, 1.0])
def test_the_gain_of_a_mask_on_normal_inputs(t, smoothing):
    """d E[u S(x + u)] / du for normal x: the share kept, and the jump 2 t phi(t); the box has a bias in its width."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    mask = TrainedMask(Rule(threshold=t), (torch.tensor(0.0),), 1.0, smoothing)
    mask(x).mean().backward()
    gain = float(x.grad.mean() * len(x))
    share = math.erfc(t / math.sqrt(2))
    jump = 2 * t * density(t) if smoothing else 0.0
    assert gain == pytest.approx(share + jump, rel=0.02 if smoothing <= 0.2 else 0.2)


def test_a_trained_shift_replaces_what_rests():
    """S(x - mu) + mu: kept inputs are exact, resting ones mu; and mu is pulled toward the mean of what rests."""
    x = torch.tensor([[0.1, 2.0], [0.3, -1.0]])
    mu = nn.Parameter(torch.tensor([0.1, 0.0]))
    mask = TrainedMask(Rule(threshold=0.5), (torch.tensor(0.0),), 1.0, smoothing=0.0, shift=mu)
    filled = mask(x) + mu
    torch.testing.assert_close(filled, torch.tensor([[0.1, 2.0], [0.1, -1.0]]))
    (filled - x).square().sum().backward()
    torch.testing.assert_close(mu.grad, torch.tensor([-2 * (0.3 - 0.1), 0.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, torch.tensor([0.5, 1.0, 2.0])])
@pytest.mark.parametrize("delta", [0.0, 0.4, torch.tensor([0.1, -0.3, 0.2])])
def test_the_mask_is_that_of_the_scaled_rule_bit_for_bit(dtype, scale, delta):
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    rule = Rule(threshold=0.6, scale=scale)
    mask = TrainedMask(rule, (nn.Parameter(torch.as_tensor(delta)),), 1.0, smoothing=0.0)
    kept = mask(x)
    assert torch.equal(kept, masked(x, scaled(rule, torch.as_tensor(delta))))
    expected = x.abs().float() * torch.as_tensor(scale) > 0.6 * torch.as_tensor(delta).exp()
    assert torch.equal(kept != 0, expected)
    kept.sum().backward()
    assert torch.equal(x.grad != 0, expected)


class Fixed:
    def __init__(self, gradient, byte_slope):
        self.delta = nn.Parameter(torch.tensor(0.0))
        self.delta.grad = torch.tensor(gradient)
        self.byte_slope = torch.tensor(byte_slope)

    def trained(self):
        yield self.delta, self.byte_slope


def test_where_all_bytes_cost_the_same_thresholds_stay():
    masks = {Site(i, "q"): Fixed(0.3 * b, b) for i, b in enumerate((-0.1, -0.4, -0.02))}
    ConstantBytes().project(masks)
    assert all(abs(float(m.delta.grad)) < 1e-7 for m in masks.values())


def test_descent_moves_bytes_to_where_they_help():
    """The first site loses more by a resting byte than the second: its threshold falls, the other's rises."""
    cheap, dear = Fixed(0.01, -0.1), Fixed(0.5, -0.1)
    ConstantBytes().project({Site(0, "q"): dear, Site(1, "q"): cheap})
    assert float(dear.delta.grad) > 0 > float(cheap.delta.grad)


def test_a_step_changes_no_bytes_to_first_order():
    masks = {Site(i, "q"): Fixed(0.0, b) for i, b in enumerate((-0.1, -0.4))}
    before = {site: mask.delta.detach().clone() for site, mask in masks.items()}
    with torch.no_grad():
        masks[Site(0, "q")].delta += 0.3
    ConstantBytes().give_back(masks, before)
    assert sum(float(m.byte_slope * m.delta.detach()) for m in masks.values()) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("inner", [Teal(0.5), Teal(0.5, allocation="greedy", step=0.1), RSparse(0.5, rho=0.6)])
@pytest.mark.parametrize("thresholds", ["site", "channel", "both"])
def test_refined_plans_meet_the_target_and_lower_the_loss(llama, calibration, inner, thresholds):
    calibrated = CalibratedModel(llama, calibration)
    method = Spontaneous(inner, thresholds=thresholds, learning_rate=1e-9, **SHORT | {"steps": 60})
    plan = method.plan_for(calibrated)
    assert calibrated.measure(plan) == pytest.approx(0.5, abs=0.004)
    losses = plan.info["losses"]
    assert sum(losses[-10:]) < sum(losses[:10])
    base = inner.plan_for(calibrated)
    ratios = {
        s: float(torch.as_tensor(r.threshold).mean() / torch.as_tensor(base.rules[s].threshold).mean())
        for s, r in plan.rules.items()
    }
    assert max(ratios.values()) > 1.02 > 0.98 > min(ratios.values())


def test_refining_nothing_is_spon(llama, calibration):
    """With a rate of zero in effect the thresholds are those of SPON, and so are the biases."""
    plain = Spontaneous(Teal(0.5), **SHORT).fit(llama, calibration)
    refined = Spontaneous(Teal(0.5), thresholds="site", **SHORT | {"threshold_rate": 1e-12}).fit(llama, calibration)
    for site, rule in plain.rules.items():
        assert refined.rules[site].threshold == pytest.approx(rule.threshold, rel=1e-6)
        if rule.bias is not None:
            torch.testing.assert_close(refined.rules[site].bias, rule.bias, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (Cats(0.3), r"masks are trained at linear layers; spon\(cats\) masks the activated gate"),
        (Chess(0.3, attention=True), r"spon\(chess-attention\) masks the activated gate"),
        (Teal(0.5, topk=True), r"spon\(teal-topk\) has no threshold on \|x\| at 0.down"),
    ],
)
def test_what_has_no_threshold_is_refused(llama, calibration, inner, message):
    with pytest.raises(SparsifierError, match=message):
        Spontaneous(inner, thresholds="site", **SHORT).fit(llama, calibration)


EVERYTHING = {"shift": True, "thresholds": "both", "gains": True, "rank": 2, "smoothing": 1.0}


@pytest.mark.parametrize(
    "more",
    [
        {"shift": True},
        {"smoothing": 1.0},
        {"shift": True, "thresholds": "site"},
        {"thresholds": "both"},
        {"gains": True},
        {"rank": 2},
        EVERYTHING,
    ],
)
def test_the_plan_is_what_was_trained(llama, calibration, ids, more):
    """The last loss of a run without averaging is that of its plan on the same tokens."""
    calibrated = CalibratedModel(llama, calibration)
    method = Spontaneous(Teal(0.5), sites=("q", "down"), match=False, **more, **SHORT)
    plan = method.fit(llama, calibration)
    compensation = method._compensation(calibrated)
    with torch.no_grad():
        for parameter in compensation.parameters.values():
            parameter.copy_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    base = method.inner.plan_for(calibrated)
    with base.applied(llama) as layers, torch.no_grad():
        compensation.attach(base, layers)
        compensation.attach(base, layers)  # before every step anew
        trained = llama(ids).logits
    with compensation.compensated(base, compensation.parameters).applied(llama), torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, trained, rtol=1e-4, atol=1e-5)
    assert plan.info["losses"][-1] > 0
    if "shift" in more:
        assert all(torch.as_tensor(rule.shift).any() for rule in plan.rules.values())


def test_a_shift_on_the_dense_model_changes_nothing(llama, ids, calibration):
    """Its part of the bias gives back what it takes; it cannot be folded, or a dense token would get that too."""
    calibrated = CalibratedModel(llama, calibration)
    method = Spontaneous(Teal(0.5), shift=True, match=False, **SHORT)
    compensation, base = method._compensation(calibrated), method.inner.plan_for(calibrated)
    with torch.no_grad():
        for name, parameter in compensation.parameters.items():
            parameter.fill_(0.05 if name.startswith("shift/") else 0.0)
        dense = llama(ids).logits
    plan = compensation.compensated(base, compensation.parameters)
    with plan.biases_only().applied(llama), torch.no_grad():
        torch.testing.assert_close(llama(ids).logits, dense, rtol=1e-3, atol=1e-4)
    with pytest.raises(PlanError, match="such a plan cannot be folded"), plan.folded(llama):
        pass


def test_parameters_have_one_entry_a_site_or_a_channel(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = Teal(0.5).plan_for(calibrated)
    sites = calibrated.decoder.sites(("down",))
    for thresholds, shape in (("site", ()), ("channel", (32,))):
        found = Compensation.of(calibrated.decoder, sites, plan, calibrated.device, thresholds=thresholds)
        assert found.parameters["threshold/0.q"].shape == shape
        assert found.parameters["alpha/2.down"].shape == (1, 48)


def test_the_slope_of_a_site_is_that_of_its_channels_together():
    """Both deltas are added, so that the derivative in the site's is the sum of those in its channels'."""
    x = torch.randn(50_000, 4, generator=torch.Generator().manual_seed(0))
    site, channels = nn.Parameter(torch.tensor(0.1)), nn.Parameter(torch.tensor([0.1, 0.0, -0.2, 0.3]))
    mask = TrainedMask(Rule(threshold=0.7), (site, channels), 0.25, smoothing=0.0)
    (mask(x) * x.sign()).sum(1).mean().backward()
    cutoffs = [0.7 * math.exp(0.1 + float(c)) for c in channels]
    expected = torch.tensor([-2 * t * t * density(t) for t in cutoffs])
    torch.testing.assert_close(channels.grad, expected, rtol=0.06, atol=0)
    torch.testing.assert_close(site.grad, channels.grad.sum())
    (_, of_site), (_, of_channels) = mask.trained()
    torch.testing.assert_close(of_site, of_channels.sum())
    torch.testing.assert_close(
        of_channels, torch.tensor([0.25 * -2 * t * density(t) for t in cutoffs]), rtol=0.06, atol=0
    )


def test_a_step_of_channels_is_given_back_by_the_sites():
    x = torch.randn(2_000, 4, generator=torch.Generator().manual_seed(0))
    masks = {}
    for block in range(2):
        deltas = nn.Parameter(torch.tensor(0.0)), nn.Parameter(torch.zeros(4))
        masks[Site(block, "q")] = TrainedMask(Rule(threshold=0.5 + block), deltas, 0.25, smoothing=0.0)
        masks[Site(block, "q")](x).sum().backward()
    before = {site: mask.delta.detach().clone() for site, mask in masks.items()}
    with torch.no_grad():
        masks[Site(0, "q")].deltas[1][2] += 0.2
    ConstantBytes().give_back(masks, before)
    assert float(masks[Site(0, "q")].deltas[0]) == float(masks[Site(1, "q")].deltas[0]) < 0
    changed = sum(float((m.byte_slope * (m.delta - before[s])).sum()) for s, m in masks.items())
    assert changed == pytest.approx(0.0, abs=1e-7)


def test_gains_and_updates_are_those_of_the_weights(llama, calibration, ids):
    """The loss and its gradients are those of a model whose weights are (W + U V) diag(1 + g)."""
    calibrated = CalibratedModel(llama, calibration)
    method = Spontaneous(Teal(0.5), sites=("q",), gains=True, rank=2, match=False, **SHORT)
    compensation, base, site = method._compensation(calibrated), method.inner.plan_for(calibrated), Site(1, "q")
    gain, update = (compensation.parameters[f"{kind}/{site}"] for kind in ("gain", "update"))
    with torch.no_grad():
        for parameter in (gain, update):
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    with base.applied(llama) as layers:
        compensation.attach(base, layers)
        trained = llama(ids).logits
        slopes = torch.autograd.grad(trained.square().mean(), (gain, update))
    weight = llama.model.layers[1].self_attn.q_proj.weight.detach()
    changed = (weight + update[: len(weight)] @ update[len(weight) :].T) * (1 + gain)
    x = []
    with base.applied(llama):
        handle = llama.model.layers[1].self_attn.q_proj.register_forward_hook(
            lambda module, args, y: (
                x.append(args[0]) or torch.cat([y[:, :1], masked(args[0][:, 1:], base.rules[site]) @ changed.T], 1)
            )
        )
        expected = llama(ids).logits
        handle.remove()
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        slopes, torch.autograd.grad(expected.square().mean(), (gain, update)), rtol=1e-3, atol=1e-7
    )


def test_everything_at_its_start_is_the_bare_sparsifier(llama, ids, calibration):
    calibrated = CalibratedModel(llama, calibration)
    method = Spontaneous(Teal(0.5), sites=("q", "down"), match=False, **EVERYTHING, **SHORT)
    compensation, base = method._compensation(calibrated), method.inner.plan_for(calibrated)
    with base.applied(llama) as layers, torch.no_grad():
        bare = llama(ids).logits
        compensation.attach(base, layers)
        assert torch.equal(llama(ids).logits, bare)
    with compensation.compensated(base, compensation.parameters).applied(llama), torch.no_grad():
        # Weights of their own are applied to the sparse tokens apart: matrices of other shapes round otherwise.
        torch.testing.assert_close(llama(ids).logits, bare, rtol=1e-4, atol=1e-5)


def test_a_plan_with_everything_is_saved_and_reads_no_more(tmp_path, llama, calibration):
    """Weights are replaced, not added: only the biases count."""
    calibrated = CalibratedModel(llama, calibration)
    plan = Spontaneous(Teal(0.5), sites=("q", "down"), **EVERYTHING, **SHORT).plan_for(calibrated)
    assert calibrated.measure(plan) == pytest.approx(0.5, abs=0.004)
    assert all(rule.extra_elements() == rule.bias.numel() for rule in plan.rules.values())
    plan.save(tmp_path / "plan.safetensors")
    again = Plan.load(tmp_path / "plan.safetensors")
    assert all(again.rules[site].same_mask(rule) for site, rule in plan.rules.items())
    assert all(torch.equal(again.rules[site].weight, rule.weight) for site, rule in plan.rules.items())


@pytest.mark.parametrize("more", [{"gains": True}, {"rank": 2}])
def test_weights_are_not_trained_beside_a_low_rank_part(llama, calibration, more):
    with pytest.raises(SparsifierError, match=r"spon\(rsparse\) has a low-rank part beside them at "):
        Spontaneous(RSparse(0.5, rho=0.6), **more, **SHORT).fit(llama, calibration)
