"""The Fisher-weighted closed form against brute force, and on data whose solution is known."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resting.baselines.cats import Cats
from resting.baselines.teal import Teal
from resting.method.fisher import FisherError, _Sums, fisher_bias
from resting.sparsifier import CalibratedModel, Calibration, Rule, Site, SparsifierError


def test_the_closed_form_is_the_least_squares_solution():
    g, e = (torch.randn(500, 6, generator=torch.Generator().manual_seed(s)).double() for s in (0, 1))
    sums = _Sums()
    for part in (slice(0, 200), slice(200, 500)):
        sums.add(g[part], e[part])
    expected = torch.linalg.lstsq(g, (g * e).sum(1, keepdim=True)).solution[:, 0]
    torch.testing.assert_close(sums.solve(1e-12), expected, rtol=1e-8, atol=1e-10)
    assert float(sums.solve(1e9).norm()) < 1e-6  # all damping: no bias


def test_a_constant_error_is_found_exactly():
    g = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)).double()
    constant = torch.arange(6.0).double()
    sums = _Sums()
    sums.add(g, constant.expand(500, 6))
    torch.testing.assert_close(sums.solve(1e-12), constant, rtol=1e-8, atol=1e-9)


def test_against_brute_force(llama):
    """Token by token, with gradients of the whole model's log-probabilities; same labels."""
    windows = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(4))
    calibrated = CalibratedModel(llama, Calibration(windows))
    plan = Teal(0.5).plan_for(calibrated)
    site, linear = Site(1, "down"), llama.model.layers[1].mlp.down_proj
    found = fisher_bias(calibrated, plan, [site], windows=3, damping=0.01, seed=7)[site]

    labels = torch.Generator().manual_seed(7)
    fisher, right = torch.zeros(32, 32).double(), torch.zeros(32).double()
    for ids in windows:
        kept = {}

        def keep(module, args, output, kept=kept):
            output.retain_grad()
            kept["x"], kept["y"] = args[0], output

        handle = linear.register_forward_hook(keep)
        log_p = llama(ids[None]).logits[0].log_softmax(-1)
        handle.remove()
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=labels)
        log_p.gather(1, drawn).sum().backward()
        for t in range(1, 12):  # the first token is dense
            x, g = kept["x"][0, t].detach().double(), kept["y"].grad[0, t].double()
            e = linear.weight.detach().double() @ torch.where(x.abs() <= plan.rules[site].threshold, x, 0.0)
            fisher += torch.outer(g, g)
            right += g * (g @ e)
    damped = fisher + 0.01 * fisher.diagonal().mean() * torch.eye(32).double()
    torch.testing.assert_close(found.double(), torch.linalg.inv(damped) @ right, rtol=1e-3, atol=1e-5)


def test_the_model_is_left_as_it_was(llama, calibration):
    FisherError(Teal(0.5), windows=2).fit(llama, calibration)
    assert all(p.requires_grad and p.grad is None for p in llama.parameters())


def test_seeds_reproduce(llama, calibration):
    a, b, c = (
        FisherError(Teal(0.5), windows=2, seed=s).fit(llama, calibration).rules[Site(0, "down")].bias for s in (0, 0, 1)
    )
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"damping": 0.0}, "damping must be above 0, got 0"), ({"windows": 0}, "windows must be at least 1, got 0")],
)
def test_bad_parameters(changes, message):
    with pytest.raises(SparsifierError, match=message):
        FisherError(Teal(0.5), **changes)


def test_what_a_low_rank_part_stands_for_is_not_an_error(llama, calibration):
    """With U V = W nothing is lost, whatever rests."""
    calibrated = CalibratedModel(llama, calibration)
    plan, site = Teal(0.5).plan_for(calibrated), Site(1, "down")
    rule = plan.rules[site]
    u, s, v = torch.linalg.svd(llama.model.layers[1].mlp.down_proj.weight.detach(), full_matrices=False)
    whole = replace(plan, rules=plan.rules | {site: replace(rule, low_rank=(u, s[:, None] * v))})
    assert float(fisher_bias(calibrated, plan, [site])[site].norm()) > 1e-3
    assert float(fisher_bias(calibrated, whole, [site])[site].norm()) < 1e-5


def test_sites_that_an_allocation_leaves_dense_get_no_bias(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = Teal(0.5).plan_for(calibrated)
    some = replace(plan, rules=plan.rules | {Site(0, "q"): Rule()})
    sites = calibrated.decoder.sites(("q", "down"))
    assert set(fisher_bias(calibrated, some, sites)) == set(sites) - {Site(0, "q")}


def test_padding_is_refused(llama, calibration):
    padded = replace(calibration, attention_mask=torch.ones_like(calibration.windows))
    with pytest.raises(SparsifierError, match="without padding"):
        FisherError(Teal(0.5)).fit(llama, padded)


def test_where_nothing_is_masked(llama, calibration):
    with pytest.raises(SparsifierError, match="cats masks no input of down: nothing is dropped there"):
        FisherError(Cats(0.3)).fit(llama, calibration)
