"""Decoding under neuron masks: what the definition gives, from what is kept alone, by a step and without one."""

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
from resting.sparsifier.decoding.step.by_step import step_of
from resting.sparsifier.neurons.down import NeuronDown

IDS = torch.randint(3, 97, (2, 14), generator=torch.Generator().manual_seed(1))
WIDTH = 48
HALF = (torch.arange(WIDTH) % 3 > 0).to(torch.uint8)
STAY = {
    "fixed": NeuronMask("fixed", tensors={"keep": HALF}),
    "prompt": NeuronMask("prompt", kept=20),
    "clusters-prompt": NeuronMask("clusters-prompt", tensors={"codebook": torch.stack([HALF, 1 - HALF])}),
}
BOOK = (torch.rand(7, WIDTH, generator=torch.Generator().manual_seed(3)) > 0.5).to(torch.uint8)
HEAD = torch.randn(7, 32, generator=torch.Generator().manual_seed(4)).half()
CHANGE = {
    "up": NeuronMask("up", 0.3),
    "up, scaled": NeuronMask("up", 0.2, scale=torch.linspace(0.0, 2.0, WIDTH)),
    "clusters-head": NeuronMask(
        "clusters-head", tensors={"codebook": BOOK, "head": HEAD, "head_bias": torch.linspace(-1.0, 1.0, 7).half()}
    ),
}
"""Masks that a step on a CPU computes for every token."""


@pytest.fixture
def without_step(monkeypatch):
    monkeypatch.setattr("resting.sparsifier.decoding.decoder.known_form", lambda *given: None)


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


def check(model, plan, atol=1e-4):
    """Two sequences, one after the other, each by its own mask, are what the definition gives; so is a batch."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = []
    for row in IDS:
        with plan.applied(model, DecodeOnly()):
            expected.append(stepwise(model, row[None]))
    with decoding(plan, model, DecodeOnly()):
        by_a_step = step_of(model) is not None
        found = [stepwise(model, row[None]) for row in IDS]
        assert not by_a_step or model.forward.steps == 2 * (IDS.shape[1] - 6)
        both = model(IDS).logits  # more than one row goes through the definition
        assert model.state_dict().keys() == before.keys()
        with pytest.raises(PlanError, match="applied to this model already"), plan.applied(model, DecodeOnly()):
            pass
    torch.testing.assert_close(torch.cat(found), torch.cat(expected), rtol=1e-4, atol=atol)
    with plan.applied(model, DecodeOnly()):
        torch.testing.assert_close(both, model(IDS).logits, rtol=1e-4, atol=atol)
    assert not torch.allclose(found[0][:, 6:], stepwise(model, IDS[:1])[:, 6:], atol=1e-3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(module, DecodeNeurons | NeuronDown) for module in model.modules())
    return by_a_step


FAMILIES = pytest.mark.parametrize("family", ["llama", "phi3", "gemma2"])


@torch.no_grad()
@FAMILIES
@pytest.mark.parametrize("name", STAY | CHANGE)
def test_a_step_gives_what_the_definition_gives(family, name):
    model = decoder_of(family)
    assert check(model, plan_of(model, (STAY | CHANGE)[name]))


@torch.no_grad()
@FAMILIES
@pytest.mark.parametrize("name", STAY)
def test_layers_give_what_the_definition_gives(family, name, without_step):
    model = decoder_of(family)
    assert not check(model, plan_of(model, STAY[name]))


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "phi3"])
@pytest.mark.parametrize("name", ["prompt", "up", "clusters-head"])
def test_rules_beside_masks(family, name):
    model = decoder_of(family)
    rules = {site: Rule(threshold=0.1 + site.block / 7) for site in Decoder.of(model).sites()}
    assert check(model, plan_of(model, (STAY | CHANGE)[name], rules))


@torch.no_grad()
@pytest.mark.parametrize("name", ["fixed", "prompt"])
def test_a_step_reads_weights_and_grows(name):
    """Weights that are written to are read again with the mask of the sequence, and room for tokens grows."""
    model = decoder_of("llama")
    plan = plan_of(model, STAY[name])
    ids = torch.randint(3, 97, (1, 300), generator=torch.Generator().manual_seed(1))
    with plan.applied(model, DecodeOnly()):
        expected = stepwise(model, ids, 20)
    written = model.model.layers[1].mlp.up_proj.weight
    wrong = written + 1.0
    right = written.clone()
    with decoding(plan, model, DecodeOnly()):
        out = model(ids[:, :20], use_cache=True)
        found = [out.logits]
        for i in range(20, ids.shape[1]):
            if i in (30, 40):
                written.copy_(wrong if i == 30 else right)
            out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    found = torch.cat(found, 1)
    torch.testing.assert_close(found[:, :30], expected[:, :30], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found[:, 30:40], expected[:, 30:40], atol=1e-3)


@pytest.mark.parametrize("name", ["fixed", "prompt", "up", "clusters-head"])
def test_generate_goes_through_the_step(name):
    model = decoder_of("llama")
    plan, settings = plan_of(model, (STAY | CHANGE)[name]), {"max_new_tokens": 7, "do_sample": False}
    with plan.applied(model, DecodeOnly()):
        expected = [model.generate(row[None, :9], **settings) for row in IDS]
    with decoding(plan, model, DecodeOnly()):
        found = [model.generate(row[None, :9], **settings) for row in IDS]
        assert model.forward.steps == 2 * 6
    assert torch.equal(torch.cat(found), torch.cat(expected))


def test_a_step_takes_the_sequence_of_the_last_prompt_alone():
    """As the definition: the mask of one prompt never serves another sequence, nor one whose tokens went elsewhere."""
    model = decoder_of("llama")
    with torch.no_grad(), decoding(plan_of(model, STAY["prompt"]), model, DecodeOnly()):
        first = model(IDS[:1, :6], use_cache=True).past_key_values
        model(IDS[:1, 6:7], past_key_values=first, use_cache=True)
        second = model(IDS[1:, :6], use_cache=True).past_key_values
        model(IDS[1:, 6:7], past_key_values=second, use_cache=True)
        assert model.forward.steps == 2
        with pytest.raises(SparsifierError, match="did not all come through this plan"):
            model(IDS[:1, 7:8], past_key_values=first, use_cache=True)
        second.crop(-1)
        with pytest.raises(SparsifierError, match="did not all come through this plan"):
            model(IDS[1:, 6:7], past_key_values=second, use_cache=True)


def test_a_step_in_bfloat16_is_close():
    model = decoder_of("llama").to(torch.bfloat16)
    for mask in (STAY | CHANGE).values():
        plan = plan_of(model, mask)
        with torch.no_grad(), plan.applied(model, DecodeOnly()):
            expected = stepwise(model, IDS[:1]).float()
        with torch.no_grad(), decoding(plan, model, DecodeOnly()):
            assert step_of(model) is not None
            found = stepwise(model, IDS[:1]).float()
        assert float((found - expected).square().mean() / expected.square().mean()) < 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", ["fixed", "up"])
def test_a_step_reads_nothing_of_what_rests(name):
    """Weights of neurons that rest for every token, by a mask or a scale of 0, may be lost once a sequence decodes."""
    model = decoder_of("llama")
    mask = STAY["fixed"] if name == "fixed" else NeuronMask("up", 0.0, scale=HALF.float())
    with decoding(plan_of(model, mask), model, DecodeOnly()):
        expected = stepwise(model, IDS[:1])
        out = model(IDS[:1, :6], use_cache=True)
        found = []
        for layer in model.model.layers:
            for weight in (layer.mlp.gate_proj.weight, *([layer.mlp.up_proj.weight] if name == "fixed" else [])):
                weight[HALF == 0] = float("nan")
            layer.mlp.down_proj.down.weight[:, HALF == 0] = float("nan")
        for i in range(6, IDS.shape[1]):
            out = model(IDS[:1, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
        assert model.forward.steps == 2 * (IDS.shape[1] - 6)
    assert torch.equal(torch.cat(found, 1), expected[:, 6:])


@torch.no_grad()
def test_layers_read_nothing_of_what_rests(without_step):
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


LOW_RANK = Rule(threshold=0.1, low_rank=(torch.ones(48, 1), torch.ones(1, 32)))


@pytest.mark.parametrize("name", CHANGE)
def test_without_a_step_masks_of_tokens_are_refused(llama, name, without_step):
    with pytest.raises(SparsifierError, match="for which there is no decode kernel here"):
        decoding(plan_of(llama, CHANGE[name]), llama, DecodeOnly()).__enter__()
    plan = plan_of(llama, STAY["fixed"], {Site(0, "q"): Rule(threshold=0.1)})
    with pytest.raises(SparsifierError, match="has rules beside neuron masks"):
        decoding(plan, llama, DecodeOnly()).__enter__()


def test_what_has_no_kernel_is_refused(llama):
    cases = {
        "chooses neurons anew for every token, by 'product'": (NeuronMask("product", 0.1), {}, DecodeOnly()),
        "chooses neurons anew for every token, by 'up'": (NeuronMask("up", kept=9), {}, DecodeOnly()),
        "a low-rank part at a matrix whose rows rest": (STAY["fixed"], {Site(0, "gate"): LOW_RANK}, DecodeOnly()),
        "token policy all-but-first-1 leaves none": (STAY["prompt"], {}, AllButFirst(1)),
    }
    for said, (mask, rules, tokens) in cases.items():
        plan = plan_of(llama, mask, rules)
        with pytest.raises(SparsifierError, match=said), decoding(plan, llama, tokens):
            pass
    assert Site(0, NEURONS) in plan.neurons
    assert all(p.is_contiguous() for p in llama.parameters())
    with torch.no_grad(), decoding(plan_of(llama, STAY["prompt"]), llama, DecodeOnly()):
        first = llama(IDS[:1], use_cache=True).past_key_values
        llama(IDS[1:, :3], use_cache=True)
        with pytest.raises(SparsifierError, match="did not all come through this plan"):
            llama(IDS[:1, :1], past_key_values=first)
