"""Replaced weights decode as they are defined; masks of the token and rescaled inputs are refused by name."""

from __future__ import annotations

import pytest
import torch
from families import build
from replaced import with_weights
from served import decoded

from resting.sparsifier import ACT, AllButFirst, DecodeOnly, Plan, Rule, Site, SparsifierError
from resting.sparsifier.decoding.decoder import decoding
from resting.sparsifier.fingerprint import of_model


@pytest.mark.parametrize("policy", [AllButFirst(1), DecodeOnly()], ids=str)
@pytest.mark.parametrize("known", [True, False], ids=["by a step", "by layers"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_replaced_weights_decode_as_they_are_defined(family, known, policy, monkeypatch):
    if not known:
        monkeypatch.setattr("resting.sparsifier.decoding.decoder.known_form", lambda *given: None)
    model = build(family)
    ids = torch.randint(3, 97, (1, 14), generator=torch.Generator().manual_seed(0))
    before = {name: p.clone() for name, p in model.named_parameters()}
    plan = with_weights(model)
    with plan.applied(model, policy):
        wanted = decoded(model, ids, 8)
    with decoding(plan, model, policy, threads=1):
        found = decoded(model, ids, 8)
    assert torch.allclose(found, wanted, atol=2e-4)
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters())


@pytest.mark.parametrize("known", [True, False], ids=["by a step", "by layers"])
def test_replaced_weights_under_a_mask_of_the_gate(known, monkeypatch):
    if not known:
        monkeypatch.setattr("resting.sparsifier.decoding.decoder.known_form", lambda *given: None)
    model = build("llama")
    plan = with_weights(model, {Site(0, ACT): Rule(threshold=0.02)})
    plan = Plan({s: r for s, r in plan.rules.items() if s.role in (ACT, "up", "q")}, "x", 0.3, 0.3, plan.model)
    plan.rules[Site(0, "up")] = Rule(weight=0.15 * torch.randn(48, 32, generator=torch.Generator().manual_seed(6)))
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    with plan.applied(model):
        wanted = decoded(model, ids, 8)
    with decoding(plan, model, threads=1):
        assert torch.allclose(decoded(model, ids, 8), wanted, atol=2e-4)


REFUSED = [
    (Rule(threshold=0.9, mask="top-p"), "a rule with mask 'top-p' has none"),
    (Rule(threshold=-0.1, mask="statistical"), "a rule with mask 'statistical' has none"),
    (Rule(threshold=0.1, rescale=True), "a rule with rescale has no decode kernel"),
]


@pytest.mark.parametrize("known", [True, False], ids=["by a step", "by layers"])
@pytest.mark.parametrize(("rule", "message"), REFUSED)
def test_what_kernels_do_not_compute_is_refused_and_leaves_the_weights(rule, message, known, monkeypatch):
    if not known:
        monkeypatch.setattr("resting.sparsifier.decoding.decoder.known_form", lambda *given: None)
    model = build("llama")
    plan = Plan({Site(1, "down"): rule}, "x", 0.1, 0.1, of_model(model))
    with pytest.raises(SparsifierError, match=message), decoding(plan, model, threads=1):
        pass
    assert all(p.is_contiguous() for p in model.parameters())
