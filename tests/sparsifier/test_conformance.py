"""What every sparsifier owes its users; the classes in baselines/ and method/ are found, not listed."""

from __future__ import annotations

import pytest
import torch
from conformance import build, conforms, is_same
from families import build as tiny_model

from resting.benchmarks.cells import registry
from resting.sparsifier import AllButFirst, CalibratedModel, Compensated

CLASSES = [pytest.param(cls, id=name) for name, cls in sorted(registry.methods().items())]
PLAIN = [
    pytest.param(cls, dict(variant), id=name)
    for cls in registry.methods().values()
    for name, variant in {cls.name: {}, **cls.variants}.items()
]
TOPK = [
    pytest.param(cls, variant | {"topk": True}, id=f"{name}-topk")
    for (cls, variant), name in ((param.values, param.id) for param in PLAIN)
    if not issubclass(cls, Compensated)
]


def test_the_project_s_methods_are_found():
    assert {"dense", "teal", "cats", "chess", "rsparse", "mean-error", "spon"} <= set(registry.methods())


@pytest.mark.parametrize(("cls", "variant"), PLAIN + TOPK)
def test_conformance(cls, variant, llama, ids, calibration, tmp_path):
    conforms(cls, variant, llama, ids, calibration, tmp_path)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
@pytest.mark.parametrize(("cls", "variant"), PLAIN)
def test_conformance_in_other_families(cls, variant, family, ids, calibration, tmp_path):
    """Scores and sites differ between families; how many scores a mask keeps does not, nor how targets are met."""
    conforms(cls, variant, tiny_model(family), ids, calibration, tmp_path, last_alone=True)


@pytest.mark.parametrize(("cls", "variant"), PLAIN + TOPK)
def test_target_zero_is_dense_bit_for_bit(cls, variant, llama, ids, calibration):
    with torch.no_grad():
        dense = llama(ids).logits
    method = build(cls, 0.0, **variant)
    plan = method.plan_at(CalibratedModel(llama, calibration), 0.0)
    with torch.no_grad(), plan.applied(llama, AllButFirst(0)):
        assert is_same(plan, llama(ids).logits, dense)


@pytest.mark.parametrize("cls", CLASSES)
def test_documentation(cls):
    assert cls.__doc__
    assert len(cls.__doc__.strip()) > 20
    assert cls.name == cls.name.lower()
