"""What every sparsifier owes its users; the classes in baselines/ and method/ are found, not listed."""

from __future__ import annotations

import inspect
import json
from typing import Any

import pytest
import torch

from benchmarks import registry
from sparsifier import (
    LINEAR_ROLES,
    AllButFirst,
    Calibration,
    Compensated,
    Decoder,
    Fitting,
    Meter,
    Plan,
    Sparsifier,
    TargetUnreachableError,
)
from sparsifier.allocation import coverage

QUICK = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1, "seed": 0}
QUICK |= {"step": 0.1, "population": 4, "generations": 1, "group": 3}


def build(cls: type[Sparsifier], target: float, **variant: Any) -> Sparsifier:
    """The smallest instance of a method: wrappers over TEAL, training and searches as short as they get."""
    allowed = inspect.signature(cls).parameters
    values = {k: v for k, v in QUICK.items() if k in allowed} | variant
    if issubclass(cls, Compensated):
        return cls(registry.methods()["teal"](target=target), **values)
    return cls(target=target, **values)


CLASSES = [pytest.param(cls, id=name) for name, cls in sorted(registry.methods().items())]
VARIANTS = [
    pytest.param(cls, dict(variant) | topk, id=f"{name}{'-topk' * bool(topk)}")
    for cls in registry.methods().values()
    for name, variant in {cls.name: {}, **cls.variants}.items()
    for topk in ({}, {"topk": True})
    if not topk or not issubclass(cls, Compensated)
]


def targets(method: Sparsifier, decoder: Decoder) -> list[float]:
    """Two targets below the method's ceiling: CATS and CHESS can leave no more unread than their sites hold."""
    if not method.roles:
        return [0.0]
    ceiling = sum(coverage(decoder, site) for site in decoder.sites(method.roles)) / sum(
        decoder.linear(site).weight.numel() for site in decoder.sites(LINEAR_ROLES)
    )
    if ceiling < 0.99:
        with pytest.raises(TargetUnreachableError, match=f"above this method's ceiling of {ceiling:.3f}"):
            method.ratios(Fitting(decoder.trunk, Calibration(torch.zeros(1, 8).long())), ceiling + 0.01)
    return [0.25, min(0.5, 0.9 * ceiling)]


def test_the_project_s_methods_are_found():
    assert {"dense", "teal", "cats", "chess", "rsparse", "mean-error", "spon"} <= set(registry.methods())


@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_conformance(cls, variant, model, ids, calibration, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        dense = model(ids).logits
    fitting = Fitting(model, calibration)
    for target in targets(build(cls, 0.0, **variant), Decoder.of(model)):
        method = build(cls, target, **variant)
        assert json.loads(json.dumps(method.spec())) == json.loads(json.dumps(build(cls, target, **variant).spec()))
        plan = fitting.plan(method)
        assert (plan.method, plan.target) == (method.label, target)
        # Fitting leaves the model as it was.
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        # The measured byte sparsity is the target.
        assert fitting.measure(plan) == pytest.approx(target, abs=0.01)
        # Masks and biases do something, finite, and leave the first token dense.
        meter = Meter()
        with torch.no_grad(), plan.applied(model, AllButFirst(1), meter):
            sparse = model(ids).logits
        assert torch.isfinite(sparse).all()
        assert torch.equal(sparse[:, 0], dense[:, 0])
        assert torch.equal(sparse, dense) == (target == 0.0)
        # Plans survive a save, and repeat bit for bit.
        plan.save(tmp_path / f"{target}")
        with torch.no_grad(), Plan.load(tmp_path / f"{target}").applied(model):
            assert torch.equal(model(ids).logits, sparse)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)


@pytest.mark.parametrize(("cls", "variant"), VARIANTS)
def test_target_zero_is_dense_bit_for_bit(cls, variant, llama, ids, calibration):
    with torch.no_grad():
        dense = llama(ids).logits
    method = build(cls, 0.0, **variant)
    plan = method.plan_at(Fitting(llama, calibration), 0.0)
    with torch.no_grad(), plan.applied(llama, AllButFirst(0)):
        assert torch.equal(llama(ids).logits, dense)


@pytest.mark.parametrize("cls", CLASSES)
def test_documentation(cls):
    assert cls.__doc__
    assert len(cls.__doc__.strip()) > 20
    assert cls.name == cls.name.lower()
