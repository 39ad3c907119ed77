"""Plans on a rewritten model decode to what they are defined as, by a step where no adapter is left over."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from rewriting import build, transforms

from resting.sparsifier import AllButFirst, Decoder, Plan, Rule, SparsifierError, fingerprint
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.step import by_step


def plan_of(model, kind):
    """Thresholds, and a bias at every site: what o and down add to the residual stream has to be rotated."""
    decoder, generator = Decoder.of(model), torch.Generator().manual_seed(0)
    rules = {}
    for site in decoder.sites():
        matrix = decoder.projection(site)
        bias = 0.3 * torch.randn(matrix.out_features, generator=generator)
        low_rank = (
            torch.randn(32, 1, generator=generator) * 0.1,
            torch.randn(1, matrix.in_features, generator=generator),
        )
        given = low_rank if site.role == "o" else None
        rules[site] = Rule(threshold=0.05 if site.role == "down" else 0.3, bias=bias, low_rank=given)
    return Plan(rules, "mine", 0.5, 0.5, fingerprint.of_model(model), transform=transforms()[kind])


@pytest.mark.parametrize("kind", transforms())
def test_decoding_is_the_definition(kind, monkeypatch):
    monkeypatch.setattr(by_step, "_said", set())
    model = build()
    plan, state = plan_of(model, kind), {k: v.clone() for k, v in model.state_dict().items()}
    ids = torch.randint(3, 97, (1, 14), generator=torch.Generator().manual_seed(3))
    with torch.no_grad(), plan.applied(model, AllButFirst(1)):
        wanted = model(ids).logits[0]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with torch.no_grad(), decoding(plan, model):
            out = model(ids[:, :6], use_cache=True)
            found = [out.logits[0]]
            by_a_step = by_step.step_of(model) is not None
            for i in range(6, 14):
                out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
                found.append(out.logits[0])
    assert torch.allclose(torch.cat(found), wanted, atol=2e-5 * float(wanted.abs().max()))
    assert by_a_step == (plan.transform.adapters == 0)
    assert any("adapters of the plan's rotations lie between its blocks" in str(w.message) for w in said) != by_a_step
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_rotated_stream_is_not_decoded_in_half_precision():
    for kind, transform in transforms().items():
        model = build().to(torch.bfloat16)
        plan = replace(plan_of(model, kind), rules={})
        if transform.rotations:
            message = "rotates the residual stream, which bfloat16 rounds"
            with pytest.raises(SparsifierError, match=message), decoding(plan, model):
                pass
        else:
            with decoding(plan, model):
                pass
