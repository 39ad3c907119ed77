"""A meter whose counts stay on the device gives the bytes of one that waits for every count, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resting.baselines.cats import Cats
from resting.baselines.teal import Teal
from resting.sparsifier import Meter, Site, layers, meter, policy


def measured(plan, model, ids):
    meter = Meter()
    with torch.inference_mode(), plan.applied(model, meter=meter):
        model(ids)
    with torch.no_grad(), plan.applied(model, meter=meter):
        model(ids.flip(0))
    return meter


@pytest.mark.parametrize("method", [Teal(0.5), Cats(0.3)])
def test_counts_that_are_tensors_change_no_bit(method, llama, ids, calibration, monkeypatch):
    plan = method.fit(llama, calibration)
    expected = measured(plan, llama, ids)
    exact = policy.count
    monkeypatch.setattr(policy, "count", lambda x: torch.tensor(exact(x)).double())  # as off the CPU
    found = measured(plan, llama, ids)
    assert any(isinstance(read, torch.Tensor) for read in found._read.values())
    assert found.byte_sparsity() == expected.byte_sparsity()
    assert found.site_sparsity() == expected.site_sparsity()
    assert isinstance(found.byte_sparsity(), float)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_zeros_by_nature_are_found_a_forward_later_with_the_same_result(zeros, llama, ids, calibration, monkeypatch):
    plan = Teal(0.5).fit(llama, calibration)
    kept = {site: rule for site, rule in plan.rules.items() if site.role != "down"}
    plan = replace(plan, rules=kept)
    down = llama.model.layers[1].mlp.down_proj

    def thin(module, args):
        x = args[0].clone()
        x[..., : round(zeros * x.shape[-1])] = 0.0
        return (x,)

    monkeypatch.setattr(meter, "LOOK", 64)
    handle = down.register_forward_pre_hook(thin)
    expected = measured(plan, llama, ids)
    exact = policy.count
    later = lambda x: torch.tensor(exact(x)).double()  # noqa: E731
    monkeypatch.setattr(policy, "count", later)
    monkeypatch.setattr(meter, "count", later)
    found = measured(plan, llama, ids)
    handle.remove()
    assert found.byte_sparsity() == expected.byte_sparsity()
    assert found.site_sparsity() == expected.site_sparsity()
    assert (found.site_sparsity()[Site(1, "down")] == zeros) if zeros else True
    assert found._dense == expected._dense


@pytest.mark.parametrize(("method", "sites"), [(Cats(0.3), "qkvo gate"), (Teal(0.5), "")])
def test_unmasked_inputs_are_counted_where_the_meter_wants_it_and_no_longer(
    method, sites, llama, ids, calibration, monkeypatch
):
    """Up and down rest under CATS' mask of the gate, and are counted by it; the others until few zeros are found."""
    plan = method.fit(llama, calibration)
    monkeypatch.setattr(meter, "LOOK", 8)
    asked = []
    monkeypatch.setattr(layers, "counted_unmasked", lambda x, selection: asked.append(x.shape))
    counting = Meter()
    with torch.no_grad(), plan.applied(llama, meter=counting):
        llama(ids)
        inputs = len({"qkv": 1, "o": 1, "gate": 1} if sites else {}) * len(llama.model.layers)
        assert len(asked) == inputs
        llama(ids)
        llama(ids)
    assert len(asked) == inputs
    assert counting.byte_sparsity() > 0.2
