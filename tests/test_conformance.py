"""What every sparsifier owes its users; the classes in baselines/ and method/ are found, not listed."""

from __future__ import annotations

import inspect
import json

import pytest
import torch

from benchmarks import registry
from sparsifier import AllButFirst, Compensated, Fitting, Meter, Plan, Sparsifier

QUICK = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1, "seed": 0}


def build(cls: type[Sparsifier], target: float) -> Sparsifier:
    """The smallest instance of a method: wrappers over TEAL, training as short as it gets."""
    allowed = inspect.signature(cls).parameters
    values = {k: v for k, v in QUICK.items() if k in allowed}
    if issubclass(cls, Compensated):
        return cls(registry.methods()["teal"](target=target), **values)
    return cls(target=target, **values)


METHODS = [pytest.param(cls, id=name) for name, cls in sorted(registry.methods().items())]


def targets(cls: type[Sparsifier]) -> list[float]:
    return [0.0] if not cls.roles else [0.25, 0.5]


def test_the_project_s_methods_are_found():
    assert {"dense", "teal", "mean-error", "spon"} <= set(registry.methods())


@pytest.mark.parametrize("cls", METHODS)
def test_conformance(cls, model, ids, calibration, tmp_path):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        dense = model(ids).logits
    fitting = Fitting(model, calibration)
    for target in targets(cls):
        method = build(cls, target)
        assert json.loads(json.dumps(method.spec())) == json.loads(json.dumps(build(cls, target).spec()))
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


@pytest.mark.parametrize("cls", METHODS)
def test_target_zero_is_dense_bit_for_bit(cls, llama, ids, calibration):
    with torch.no_grad():
        dense = llama(ids).logits
    method = build(cls, 0.0)
    plan = method.plan_at(Fitting(llama, calibration), 0.0)
    with torch.no_grad(), plan.applied(llama, AllButFirst(0)):
        assert torch.equal(llama(ids).logits, dense)


@pytest.mark.parametrize("cls", METHODS)
def test_documentation(cls):
    assert cls.__doc__
    assert len(cls.__doc__.strip()) > 20
    assert cls.name == cls.name.lower()
