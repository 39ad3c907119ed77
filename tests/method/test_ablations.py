"""What can be varied about spontaneous neurons: each parameter does what it says, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from resting.baselines.teal import Teal
from resting.baselines.wina import Wina
from resting.method.controls import RandomDirection
from resting.method.mean_error import MeanError
from resting.method.objectives import OBJECTIVES
from resting.method.schedule import Schedule
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import CalibratedModel, Site, SparsifierError
from resting.sparsifier.logits import final_hidden, logits

SHORT = {"steps": 4, "batch": 4, "window": 16, "warmup": 1, "match_every": 2, "learning_rate": 1e-2}


def spon(**changes):
    return Spontaneous(Teal(0.5), **(SHORT | changes))


def biases(plan):
    return {site: rule.bias for site, rule in plan.rules.items() if rule.bias is not None}


def test_the_objectives_and_their_gradients(llama, ids):
    with torch.no_grad():
        dense = final_hidden(llama, ids).flatten(0, 1)
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(0))
    sparse = (dense + 0.3 * noise).requires_grad_()
    log_p, log_q = (logits(llama, h).log_softmax(-1) for h in (dense, sparse))
    expected = {
        "forward-kl": F.kl_div(log_q, log_p, log_target=True, reduction="batchmean"),
        "reverse-kl": F.kl_div(log_p, log_q, log_target=True, reduction="batchmean"),
        "hidden-mse": (sparse - dense).square().sum() / dense.square().sum(),
    }
    assert expected.keys() == OBJECTIVES.keys()
    for name, value in expected.items():
        (slope,) = torch.autograd.grad(value, sparse, retain_graph=True)
        loss, gradient = OBJECTIVES[name](llama, dense, sparse)
        assert loss == pytest.approx(float(value.detach()), rel=1e-4)
        torch.testing.assert_close(gradient, slope, rtol=1e-3, atol=1e-7)
        assert OBJECTIVES[name](llama, dense, dense)[0] == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(
    ("blocks", "expected"), [("all", {0, 1, 2}), ("first-half", {0}), ("last-half", {1, 2}), ("every-other", {0, 2})]
)
def test_blocks(llama, calibration, blocks, expected):
    assert {site.block for site in biases(spon(blocks=blocks).fit(llama, calibration))} == expected


def test_the_output_side_trains_the_bias(llama, calibration):
    """One step of Adam moves every entry of the bias by the rate; the input side moves alpha."""
    one = {"steps": 1, "average_from": 0.0, "match": False}
    out, into = (biases(spon(side=side, **one).fit(llama, calibration)) for side in ("output", "input"))
    for site, bias in out.items():
        torch.testing.assert_close(bias.abs(), torch.full_like(bias, 1e-2), rtol=1e-3, atol=0)
        assert not torch.allclose(into[site].abs(), torch.full_like(bias, 1e-2), rtol=1e-3)


def test_more_vectors_at_the_same_input_are_a_larger_rate(llama, calibration):
    """K alphas from zero get the same gradients: their sum moves as one alpha does at K times the rate."""
    one = {"steps": 1, "average_from": 0.0, "match": False}
    three = biases(spon(vectors=3, **one).fit(llama, calibration))
    fast = biases(spon(**one | {"learning_rate": 3e-2}).fit(llama, calibration))
    for site, bias in three.items():
        torch.testing.assert_close(bias, fast[site], rtol=1e-4, atol=1e-6)


def test_coordinates_keep_the_largest_contributions(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    method = spon(coordinates=0.25)
    alpha = torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    kept = method._kept(calibrated, {"alpha/1.down": alpha})["alpha/1.down"]
    size = alpha[0].abs() * llama.model.layers[1].mlp.down_proj.weight.detach().norm(dim=0)
    assert int((kept != 0).sum()) == 12
    assert float(size[kept[0] != 0].min()) > float(size[kept[0] == 0].max())
    assert torch.equal(kept[kept != 0], alpha[kept != 0])
    assert all(float(b.abs().max()) == 0 for b in biases(spon(coordinates=0.0).fit(llama, calibration)).values())


@pytest.mark.parametrize("side", ["input", "output"])
def test_training_starts_at_the_mean_error(llama, calibration, side):
    calibrated = CalibratedModel(llama, calibration)
    start = spon(start="mean-error", side=side, steps=1, learning_rate=1e-9, match=False).plan_for(calibrated)
    expected = biases(MeanError(Teal(0.5)).fit(llama, calibration))
    for site, bias in biases(start).items():
        torch.testing.assert_close(bias, expected[site], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("side", ["input", "output"])
def test_training_starts_at_the_fisher_solution(llama, calibration, side):
    from resting.method.fisher import fisher_bias

    calibrated = CalibratedModel(llama, calibration)
    start = spon(start="fisher", side=side, steps=1, learning_rate=1e-9, match=False).plan_for(calibrated)
    expected = fisher_bias(calibrated, Teal(0.5).plan_for(calibrated), calibrated.decoder.sites(("down",)))
    for site, bias in biases(start).items():
        torch.testing.assert_close(bias, expected[site], rtol=1e-3, atol=1e-5)


def test_shuffled_tokens_are_the_same_tokens_in_another_order(calibration):
    values = {"average_from": 0.0, "match": True, "seed": 0} | SHORT
    plain, mixed = (Schedule(**values, shuffle_tokens=s).sequences(calibration) for s in (False, True))
    assert torch.equal(plain.sort(1).values, mixed.sort(1).values)
    assert not torch.equal(plain, mixed)


def test_random_directions_have_the_same_lengths(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    found, turned = (biases(method.plan_for(calibrated)) for method in (spon(), RandomDirection(spon())))
    assert found.keys() == turned.keys()
    for site, bias in found.items():
        assert float(turned[site].norm()) == pytest.approx(float(bias.norm()), rel=1e-4)
        assert abs(float(torch.cosine_similarity(turned[site], bias, dim=0))) < 0.9
    assert RandomDirection(spon()).plan_for(calibrated).method == "random-direction(spon(teal))"


def test_random_directions_need_thresholds_as_they_were():
    with pytest.raises(SparsifierError, match=r"keeps thresholds as they are; spon-refined\(teal\) refines them"):
        RandomDirection(spon(**Spontaneous.variants["spon-refined"]))


def test_the_greedy_search_of_some_modules_is_not_that_of_all(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    greedy = {"allocation": "greedy", "step": 0.1}
    Teal(0.3, **greedy).plan_for(calibrated)
    some = Teal(0.05, modules=("down",), **greedy).plan_for(calibrated)
    assert {site.role for site in some.rules} == {"down"}


@pytest.mark.parametrize("modules", [("down", "nose"), ()])
def test_unknown_modules(modules):
    with pytest.raises(SparsifierError, match=r"modules must be some of q, k, v, o, gate, up, down, got (nose|none)"):
        Teal(modules=modules)


def test_wina_ranks_channels_by_their_columns(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    rule = Wina().plan_at(calibrated, 0.5).rules[Site(1, "o")]
    weight = llama.model.layers[1].self_attn.o_proj.weight.detach()
    torch.testing.assert_close(rule.scale, weight.norm(dim=0))
    inputs = []
    with torch.no_grad():
        handle = llama.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0]))
        llama(calibration.windows[:16])
        handle.remove()
    scores = (inputs[0][:, 1:].abs() * weight.norm(dim=0)).flatten()
    assert float((scores <= rule.threshold).float().mean()) == pytest.approx(0.5, abs=0.005)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": 0}, "vectors must be at least 1, got 0"),
        ({"coordinates": 1.5}, r"coordinates must be in \[0, 1\], got 1.5"),
        ({"side": "output", "vectors": 2}, "vectors and coordinates belong to the input side"),
        ({"side": "left"}, "side must be input or output, got 'left'"),
        ({"blocks": "some"}, "blocks must be all or first-half or last-half or every-other, got 'some'"),
        ({"objective": "l1"}, "objective must be forward-kl or reverse-kl or hidden-mse, got 'l1'"),
        ({"thresholds": "block"}, "thresholds must be no or site or channel or both, got 'block'"),
        ({"start": "random"}, "start must be zero or mean-error or fisher, got 'random'"),
        ({"threshold_rate": 0.0}, "threshold_rate must be above 0, got 0"),
        ({"channel_rate": 0.0}, "channel_rate must be above 0, got 0"),
        ({"update_rate": -1.0}, "update_rate must be above 0, got -1"),
        ({"decay": "linear"}, "decay must be constant or cosine, got 'linear'"),
        ({"rank": -1}, "rank must be at least 0, got -1"),
    ],
)
def test_bad_parameters(changes, message):
    with pytest.raises(SparsifierError, match=message):
        spon(**changes)
