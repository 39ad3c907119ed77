"""SparseGPT against the paper's formulas, solved column by column with plain inverses."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from resting.benchmarks.studies import pruning, sparsegpt
from resting.sparsifier import LINEAR_ROLES, CalibratedModel, Decoder, DivergedError, Site


def correlated(tokens=400, channels=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels, channels, generator=g).double() / channels**0.5
    x = torch.randn(tokens, channels, generator=g).double() @ (mix + 0.5 * torch.eye(channels).double())
    return x * torch.rand(channels, generator=g).double().add(0.1)


def by_hand(weight, hessian, share, columns):
    """Remove column after column; the inverse is taken anew over what is left each time."""
    n = weight.shape[1]
    h = hessian + sparsegpt.DAMPING * hessian.diagonal().mean() * torch.eye(n).double()
    w, gone = weight.clone(), torch.zeros_like(weight, dtype=torch.bool)
    for i in range(n):
        if i % columns == 0:
            stop = min(i + columns, n)
            losses = torch.stack([w[:, j] ** 2 / torch.linalg.inv(h[j:, j:])[0, 0] for j in range(i, stop)], 1)
            order = losses.flatten().argsort()[: round(share * losses.numel())]
            mask = torch.zeros(losses.numel(), dtype=torch.bool)
            mask[order] = True
            gone[:, i:stop] = mask.view_as(losses)
        inverse = torch.linalg.inv(h[i:, i:])
        for row in range(len(w)):
            if gone[row, i]:
                w[row, i:] -= w[row, i] / inverse[0, 0] * inverse[0]
                w[row, i] = 0.0
    return w


@pytest.mark.parametrize("columns", [5, 24])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.75])
def test_it_is_the_algorithm_of_the_paper(share, columns):
    x = correlated()
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(3)).double()
    hessian = x.T @ x
    found = sparsegpt.sparsegpt(weight, hessian, share, columns)
    torch.testing.assert_close(found, by_hand(weight, hessian, share, columns), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_change_less_than_under_magnitude_and_wanda(dtype):
    x = correlated(channels=256, tokens=2000)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(4)).to(dtype)
    found = sparsegpt.sparsegpt(weight, (x.T @ x).float(), 0.5)
    assert found.dtype == dtype
    assert int((found == 0).sum()) == weight.numel() // 2

    def error(pruned):
        return float((x @ (pruned.double() - weight.double()).T).square().mean())

    norms = x.square().mean(0).sqrt()
    wanda = error(pruning.wanda(weight, norms, 0.5))
    magnitude = error(pruning.magnitude(weight, norms, 0.5))
    assert error(found) < 0.7 * wanda < 0.7 * magnitude


def test_channels_that_are_always_zero_lose_their_weights():
    x = correlated()
    x[:, [2, 9]] = 0.0
    weight = torch.randn(7, 24, generator=torch.Generator().manual_seed(3))
    found = sparsegpt.sparsegpt(weight, x.T @ x, 0.5)
    assert not found[:, [2, 9]].any()
    assert torch.isfinite(found).all()


def test_infinite_inputs_are_said():
    with pytest.raises(DivergedError, match="NaN or infinite"):
        sparsegpt.sparsegpt(torch.ones(2, 3), torch.full((3, 3), float("inf")), 0.5)


def bench(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    return SimpleNamespace(model=llama, calibrated_for=lambda m: calibrated, on_progress=lambda *a: None)


def test_blocks_are_pruned_on_what_the_ones_before_give(llama, calibration, ids):
    decoder, loaded = Decoder.of(llama), bench(llama, calibration)
    with torch.no_grad():
        before = llama(ids).logits
        dense = sparsegpt.hessians(loaded, [Site(1, "down")])[Site(1, "down")]
        with sparsegpt.pruned_in_turn(loaded, decoder, 0.5):
            for site in decoder.sites(LINEAR_ROLES):
                assert float((decoder.linear(site).weight == 0).double().mean()) == 0.5
            sparse = sparsegpt.hessians(loaded, [Site(1, "down")])[Site(1, "down")]
        assert torch.equal(llama(ids).logits, before)
    assert (dense - sparse).norm() > 0.01 * dense.norm()


def test_second_moments_are_those_of_the_inputs(llama, calibration):
    seen = []
    hook = llama.model.layers[1].mlp.up_proj.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, 1:]))
    found = sparsegpt.hessians(bench(llama, calibration), [Site(1, "gate"), Site(1, "up"), Site(1, "o")])
    hook.remove()
    x = torch.cat(seen).flatten(0, 1).double()
    torch.testing.assert_close(found[Site(1, "up")], x.T @ x / len(x), rtol=1e-5, atol=1e-7)
    assert found[Site(1, "gate")] is not found[Site(1, "o")]
    assert torch.equal(found[Site(1, "gate")], found[Site(1, "up")])
