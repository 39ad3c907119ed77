"""What every sparsifier owes its users, as a function: for the methods here, and for those of plug-ins."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from resting.benchmarks.cells import registry
from resting.sparsifier import (
    LINEAR_ROLES,
    NEURONS,
    AllButFirst,
    CalibratedModel,
    Calibration,
    Compensated,
    Decoder,
    LastFraction,
    Meter,
    NeuronSparsifier,
    Plan,
    Sparsifier,
    TargetUnreachableError,
)
from resting.sparsifier.allocation import coverage

QUICK = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1, "seed": 0}
QUICK |= {"step": 0.2, "population": 4, "generations": 1, "group": 3, "rises": (0.0, 0.05)}
QUICK |= {"sets": 4, "tokens": 256, "restarts": 1}


def build(cls: type[Sparsifier], target: float, **variant: Any) -> Sparsifier:
    """The smallest instance of a method: wrappers over TEAL, training and searches as short as they get."""
    allowed = inspect.signature(cls).parameters
    values = {k: v for k, v in QUICK.items() if k in allowed} | variant
    if issubclass(cls, Compensated):
        return cls(registry.methods()["teal"](target=target), **values)
    return cls(target=target, **values)


def targets(method: Sparsifier, decoder: Decoder) -> list[float]:
    """Two targets below the method's ceiling: CATS and CHESS can leave no more unread than their sites hold."""
    if not method.roles:
        return [0.0]
    covered = sum(coverage(decoder, site) for site in decoder.sites(method.roles) if site.role != NEURONS)
    ceiling = covered / sum(decoder.linear(site).weight.numel() for site in decoder.sites(LINEAR_ROLES))
    if isinstance(method, NeuronSparsifier):
        ceiling = method.ceiling(decoder)
    if ceiling < 0.99:
        with pytest.raises(TargetUnreachableError, match=f"above this method's ceiling of {ceiling:.3f}"):
            method.ratios(CalibratedModel(decoder.trunk, Calibration(torch.zeros(1, 8).long())), ceiling + 0.01)
    return [0.25, min(0.5, 0.9 * ceiling)]


def is_same(plan: Plan, found: torch.Tensor, dense: torch.Tensor) -> bool:
    """Bit for bit; up to rounding, where the model is rewritten, or dense rows are a product of their own."""
    if plan.transform is None and all(rule.weight is None for rule in plan.rules.values()):
        return torch.equal(found, dense)
    return torch.allclose(found, dense, rtol=0.0, atol=2e-5 * float(dense.abs().max()))


def conforms(cls, variant, model, ids, calibration, tmp_path, last_alone=False):
    """Fail where `cls` breaks what every sparsifier promises, at two targets or at the higher one alone."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        dense = model(ids).logits
    tokens = LastFraction(0.5) if build(cls, 0.0, **variant).needs_prompt else AllButFirst(1)
    calibrated = CalibratedModel(model, replace(calibration, tokens=tokens))
    for target in targets(build(cls, 0.0, **variant), Decoder.of(model))[-1 if last_alone else 0 :]:
        method = build(cls, target, **variant)
        assert json.loads(json.dumps(method.spec())) == json.loads(json.dumps(build(cls, target, **variant).spec()))
        plan = method.plan_for(calibrated)
        assert (plan.method, plan.target) == (method.label, target)
        # CalibratedModel leaves the model as it was.
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        # The measured byte sparsity is the target.
        assert calibrated.measure(plan) == pytest.approx(target, abs=0.01)
        # Masks and biases do something, finite, and leave the first token dense.
        meter = Meter()
        with torch.no_grad(), plan.applied(model, tokens, meter):
            sparse = model(ids).logits
        assert torch.isfinite(sparse).all()
        assert is_same(plan, sparse[:, 0], dense[:, 0])
        assert is_same(plan, sparse, dense) == (target == 0.0)
        # Plans survive a save, and repeat bit for bit.
        plan.save(tmp_path / f"{target}")
        with torch.no_grad(), Plan.load(tmp_path / f"{target}").applied(model, tokens):
            assert torch.equal(model(ids).logits, sparse)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)
