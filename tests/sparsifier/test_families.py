"""Every family of decoders conforms, unasked: what is supported is whole and right, what is not is refused by name."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from block_bytes import counted, of_blocks
from conformance import build as method_of
from decoders import CALIBRATION, CLOSE, FAMILIES, IDS, decoder_of, masks, plan_of, run, stepped

from resting.baselines.cats import Cats
from resting.benchmarks.cells import registry
from resting.sparsifier import (
    ACT,
    AllButFirst,
    CalibratedModel,
    Decoder,
    LastFraction,
    Meter,
    NeuronSparsifier,
    Plan,
    Rule,
    SparsifierError,
    Transformed,
    UnsupportedModelError,
    check_logits,
)
from resting.sparsifier.decoding import decoding

REFUSED = {
    "mamba": "no list of decoder blocks with a linear layer that has a role",
    "llama4_text": "block 0 of Llama4ForCausalLM is refused: Llama4TextExperts holds experts whose shapes do not",
    "jetmoe": "block 0 .* role 'gate_up' is of an unknown kind: input_linear is a JetMoeParallelExperts",
    "longcat_flash": "block 0 .* self_attn is a list of modules with matrices: which of them a token reads",
    "bart": "block 0 .* role 'q' is doubled",
}
SUPPORTED = [family for family in FAMILIES if family not in REFUSED]
STATEFUL = {
    "bamba": "the dense model's own cached steps differ from its whole forward",
    "recurrent_gemma": "its cache is no output of its forward",
}
"""Families that the test's loop over a cache cannot step through."""


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_not_supported_is_refused_by_name(family):
    with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
        Decoder.of(decoder_of(family))


def test_most_families_are_supported():
    assert len(SUPPORTED) >= 0.85 * len(FAMILIES)
    assert len(SUPPORTED) >= 70


@pytest.mark.parametrize("family", SUPPORTED)
def test_a_family_conforms(family, tmp_path):
    model = decoder_of(family)
    check_logits(model)
    decoder, before = Decoder.of(model), {name: value.clone() for name, value in model.state_dict().items()}
    dense = run(model)

    # At target 0 the sparse model is the dense one.
    nothing = plan_of(model, {site: Rule() for site in decoder.slots})
    with nothing.applied(model, AllButFirst(0), meter := Meter()):
        assert torch.equal(run(model), dense)
    natural = sum(meter.site_sparsity().values())
    assert (meter.byte_sparsity() == pytest.approx(0.0, abs=1e-9)) == (natural == 0.0)

    # Masks leave the first token dense, and unread what an own count says.
    plan = masks(model)
    with plan.applied(model, meter=(meter := Meter())):
        sparse = run(model)
    torch.testing.assert_close(sparse[:, 0], dense[:, 0], **CLOSE)
    assert torch.isfinite(sparse).all()
    assert not torch.allclose(sparse, dense, **CLOSE)
    own = counted(model, IDS, plan)
    assert meter.byte_sparsity() == pytest.approx(own.sparsity(), abs=1e-6)
    assert own.sparsity() > 0.05

    # All matrices of the blocks are counted, those of experts as often as a token comes to them.
    always, expert = of_blocks(model)
    shares = {block: found.experts.per_token for block, found in enumerate(decoder.found) if found.experts}
    assert shares.keys() == expert.keys()
    assert decoder.elements == pytest.approx(always + sum(size * shares[block] for block, size in expert.items()))

    # Plans survive a save; the model comes back bit for bit.
    plan.save(tmp_path / "plan")
    with Plan.load(tmp_path / "plan").applied(model):
        assert torch.equal(run(model), sparse)
    assert torch.equal(run(model), dense)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("family", [family for family in SUPPORTED if family not in STATEFUL])
def test_steps_are_the_whole_forward_and_decoding_is_applied(family):
    model = decoder_of(family)
    dense, plan = run(model), masks(model)
    torch.testing.assert_close(stepped(model), dense, rtol=1e-3, atol=1e-4)
    with plan.applied(model):
        whole, steps = run(model), stepped(model)
        generated = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    torch.testing.assert_close(steps, whole, rtol=1e-3, atol=1e-4)
    with decoding(plan, model):
        torch.testing.assert_close(stepped(model), steps, rtol=1e-3, atol=1e-4)
        assert torch.equal(model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0), generated)
    assert torch.equal(run(model), dense)


def test_a_model_whose_cache_is_no_output_has_sparse_steps():
    model = decoder_of("recurrent_gemma")
    with masks(model).applied(model), torch.no_grad():
        ids = IDS[:, :4]
        for _ in range(4):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
        out = model.generate(
            IDS[:, :4], max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        whole = model(ids, use_cache=False).logits[:, 3:-1]
    assert torch.equal(out.sequences, ids)
    torch.testing.assert_close(torch.stack(out.logits, 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", SUPPORTED)
def test_act_rests_rows_of_up_and_columns_of_down(family):
    model = decoder_of(family)
    decoder = Decoder.of(model)
    acts = decoder.sites((ACT,))
    if not acts:
        with pytest.raises(UnsupportedModelError, match="no site 'act' in any block"):
            Cats(0.1).fit(model, CALIBRATION)
        return
    everything = plan_of(model, {act: Rule(threshold=torch.inf) for act in acts})
    with everything.applied(model, AllButFirst(0), meter := Meter()):
        without_mlps = run(model)
    unread = sum(
        share * decoder.projection(under).elements * decoder.share(under)
        for act in acts
        for under, share in decoder.rests_under_act(act).items()
    )
    assert meter.byte_sparsity() == pytest.approx(unread / decoder.elements)
    # Where all rests, no number of up or down plays a part.
    with torch.no_grad():
        for act in acts:
            for under in decoder.rests_under_act(act):
                weight = decoder.projection(under).weight
                weight[weight.shape[0] // 2 * (under.role == "gate_up") :] += 1.0
    with plan_of(model, everything.rules).applied(model, AllButFirst(0)):
        assert torch.equal(run(model), without_mlps)


EVERY_METHOD = ["phi3", "opt", "gpt2", "mixtral", "gpt_oss", "deepseek_v3", "qwen3_next", "gemma3n_text"]
METHODS = {
    name: (cls, dict(variant))
    for cls in registry.methods().values()
    for name, variant in {cls.name: {}, **cls.variants}.items()
}
NO_ACT, FUSED, EXPERT = "no site 'act' in any block", "computes .* by one matrix", "one of several experts"
NOT_HERE = {
    **{("phi3", name): FUSED for name in ("chess-attention", "wina-released", "wina-released-greedy")},
    **{("gpt2", name): FUSED for name in ("wina-released", "wina-released-greedy")},
    **{("gpt2", name): NO_ACT for name in ("cats", "chess", "chess-attention")},
    **{("opt", name): "the activation must be a gate's|ceiling" for name in ("chess", "chess-attention")},
    ("opt", "cats"): "ceiling of 0.214",
    **{("gpt_oss", name): NO_ACT for name in ("cats", "chess", "chess-attention")},
}
for _family in ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"):
    NOT_HERE |= {(_family, name): FUSED for name in ("wina-released", "wina-released-greedy")}
    NOT_HERE[_family, "fisher-error"] = EXPERT
NO_NEURONS = {
    **dict.fromkeys(("gpt2", "opt"), "no MLP of .* has a gate"),
    **dict.fromkeys(("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next"), r"block \d holds experts"),
    "gemma3n_text": "cut by a quantile over all its neurons",
}
NEURON_METHODS = [name for name, (cls, _) in METHODS.items() if issubclass(cls, NeuronSparsifier)]
NOT_HERE |= {(family, name): said for family, said in NO_NEURONS.items() for name in NEURON_METHODS}
HEADS = ("rotation-heads", "rotation-global-heads")
WITH_GATE = ("wina-rotated", "wina-rotated-adapters-free")
OTHERS = (*WITH_GATE, "rotation-heads")
FOLDING = [name for name, (cls, _) in METHODS.items() if issubclass(cls, Transformed) and name not in OTHERS]
BLOCK_BY_BLOCK = ("scap", "lsq", "lsq-stream")
NO_V, NO_GATE = "has no v of its own to rotate heads by", "no site 'gate'|needs a k and a gate|by one matrix"


def refuse(families, names, said):
    NOT_HERE.update(dict.fromkeys(itertools.product(families, names), said))


WITH_EXPERTS = ("mixtral", "gpt_oss", "deepseek_v3", "qwen3_next")
refuse(WITH_EXPERTS, FOLDING, "has experts: folded norms")
refuse(WITH_EXPERTS, WITH_GATE, f"has experts: folded norms|{NO_GATE}")
refuse(WITH_EXPERTS, BLOCK_BY_BLOCK, "inputs are not carried from block to block")
refuse(("opt", "gpt2"), FOLDING, "LayerNorm, is no norm with one weight")
refuse(("opt", "gpt2"), (*WITH_GATE, "scap"), NO_GATE)
refuse(("gemma3n_text",), set(FOLDING) - {"teal-folded"}, "does not compute the same")
refuse(("gemma3n_text",), BLOCK_BY_BLOCK, "a forward calls blocks otherwise")
refuse(("phi3", "gemma3n_text"), WITH_GATE, f"does not compute the same|{NO_GATE}")
refuse(("phi3", "gemma3n_text"), HEADS, f"does not compute the same|{NO_V}")
refuse(("gpt2", "deepseek_v3", "qwen3_next"), ("rotation-heads",), NO_V)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", EVERY_METHOD)
def test_every_method_fits_or_says_why_not(family, name):
    model = decoder_of(family)
    cls, variant = METHODS[name]
    dense = run(model)
    method = method_of(cls, 0.3 if method_of(cls, 0.0, **variant).roles else 0.0, **variant)
    if said := NOT_HERE.get((family, name)):
        with pytest.raises(SparsifierError, match=said):
            method.plan_for(CalibratedModel(model, CALIBRATION))
        return
    tokens = LastFraction(0.5) if method.needs_prompt else AllButFirst(1)
    plan = method.plan_for(CalibratedModel(model, replace(CALIBRATION, tokens=tokens)))
    with plan.applied(model, tokens):
        sparse = run(model)
    assert torch.isfinite(sparse).all()
    assert torch.equal(run(model), dense)
    assert torch.equal(sparse, dense) == (method.target == 0.0)
    if method.target:
        assert plan.info["matched"] == pytest.approx(method.target, abs=0.02)
    if name in ("mean-error", "spon", "spon-refined"):
        assert any(rule.bias is not None for rule in plan.rules.values())
