"""Decoding under neuron masks that stay for a sequence: what the definition gives, from what is kept alone."""

from __future__ import annotations

import pytest
import torch
from decoders import decoder_of

from resting.sparsifier import (
    NEURONS,
    AllButFirst,
    DecodeOnly,
    Decoder,
    NeuronMask,
    Plan,
    PlanError,
    Rule,
    Site,
    SparsifierError,
    fingerprint,
)
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.neurons import DecodeNeurons

IDS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(1))
WIDTH = 48
HALF = (torch.arange(WIDTH) % 3 > 0).to(torch.uint8)
STAY = {
    "fixed": NeuronMask("fixed", tensors={"keep": HALF}),
    "prompt": NeuronMask("prompt", kept=20),
    "clusters-prompt": NeuronMask("clusters-prompt", tensors={"codebook": torch.stack([HALF, 1 - HALF])}),
}


def plan_of(model, mask, rules=None):
    sites = Decoder.of(model).neuron_sites()
    return Plan(rules or {}, "x", 0.5, 0.5, fingerprint.of_model(model), neurons=dict.fromkeys(sites, mask))


def stepwise(model, ids, prompt=6):
    out = model(ids[:, :prompt], use_cache=True)
    found = [out.logits]
    for i in range(prompt, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits)
    return torch.cat(found, 1)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])
@pytest.mark.parametrize("name", STAY)
def test_it_gives_what_the_definition_gives(family, name):
    """Two sequences, one after the other: each by its own mask."""
    model = decoder_of(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_of(model, STAY[name])
    expected = []
    for row in IDS:
        with plan.applied(model, DecodeOnly()):
            expected.append(stepwise(model, row[None]))
    with decoding(plan, model, DecodeOnly()):
        found = [stepwise(model, row[None]) for row in IDS]
        both = model(IDS).logits  # more than one row goes through the definition
        assert model.state_dict().keys() == before.keys()
        with pytest.raises(PlanError, match="applied to this model already"), plan.applied(model, DecodeOnly()):
            pass
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-4, atol=1e-4)
    with plan.applied(model, DecodeOnly()):
        torch.testing.assert_close(both, model(IDS).logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[0][:, 6:], stepwise(model, IDS[:1])[:, 6:], atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(module, DecodeNeurons) for module in model.modules())


@torch.no_grad()
def test_decoded_tokens_read_nothing_of_what_rests():
    """Weights of resting neurons may be lost once a sequence decodes."""
    model = decoder_of("llama")
    with decoding(plan_of(model, STAY["fixed"]), model, DecodeOnly()):
        expected = stepwise(model, IDS[:1])
        out = model(IDS[:1, :6], use_cache=True)
        out = model(IDS[:1, 6:7], past_key_values=out.past_key_values, use_cache=True)
        found = [out.logits]
        for layer in model.model.layers:
            mlp = layer.mlp.mlp
            for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
                weight[HALF == 0] = float("nan")
            mlp.down_proj.down.weight[:, HALF == 0] = float("nan")
        for i in range(7, IDS.shape[1]):
            out = model(IDS[:1, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    assert torch.equal(torch.cat(found, 1), expected[:, 6:])


def test_what_has_no_kernel_is_refused(llama):
    cases = {
        "chooses neurons anew for every token, by 'up'": (NeuronMask("up", 0.1), {}, DecodeOnly()),
        "has rules beside neuron masks": (STAY["fixed"], {Site(0, "q"): Rule(threshold=0.1)}, DecodeOnly()),
        "token policy all-but-first-1 leaves none": (STAY["prompt"], {}, AllButFirst(1)),
    }
    for said, (mask, rules, tokens) in cases.items():
        plan = plan_of(llama, mask, rules)
        with pytest.raises(SparsifierError, match=said), decoding(plan, llama, tokens):
            pass
    assert Site(0, NEURONS) in plan.neurons
    with torch.no_grad(), decoding(plan_of(llama, STAY["prompt"]), llama, DecodeOnly()):
        first = llama(IDS[:1], use_cache=True).past_key_values
        llama(IDS[1:, :3], use_cache=True)
        with pytest.raises(SparsifierError, match="did not all come through this plan"):
            llama(IDS[:1, :1], past_key_values=first)
