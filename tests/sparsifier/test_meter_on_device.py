"""A meter whose counts stay on the device gives the bytes of one that waits for every count, to the last bit."""

from __future__ import annotations

import pytest
import torch

from resting.baselines.cats import Cats
from resting.baselines.teal import Teal
from resting.sparsifier import Meter, policy


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
