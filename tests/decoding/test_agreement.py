"""Decode kernels agree with the definition for every prompt, policy, padding and cache."""

from __future__ import annotations

import pytest
import torch
from decoders import decoder_of, masks, stepped
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache

from resting.sparsifier import ACT, AllButFirst, DecodeOnly, LastFraction, Meter, Plan, Rule, Site
from resting.sparsifier.decoding import decoding
from resting.sparsifier.fingerprint import of_model

MODEL = build("llama")
ROLES = ("q", "k", "v", "o", "gate", "up", "down")
PLANS = [
    Plan({Site(b, r): Rule(threshold=0.25) for b in range(3) for r in ROLES}, "x", 0.3, 0.3, of_model(MODEL)),
    Plan({Site(b, ACT): Rule(threshold=0.05) for b in range(3)}, "y", 0.3, 0.3, of_model(MODEL)),
]
POLICIES = [AllButFirst(0), AllButFirst(1), AllButFirst(3), AllButFirst(9), LastFraction(0.5), LastFraction(0.0)]
POLICIES += [DecodeOnly(), DecodeOnly(0), DecodeOnly(4)]


def tokens(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_steps(ids: torch.Tensor, cuts: list[int], static: bool) -> torch.Tensor:
    """Logits of all tokens, which come in pieces that begin at `cuts`."""
    config = MODEL.config
    cache = StaticCache(config=config, max_cache_len=32) if static else DynamicCache(config=config)
    ends = [*cuts[1:], ids.shape[1]]
    with torch.inference_mode():
        pieces = [MODEL(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in zip(cuts, ends)]
    return torch.cat(pieces, 1)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    plan=st.sampled_from(PLANS),
    policy=st.sampled_from(POLICIES),
    cuts=st.lists(st.integers(1, 11), max_size=8, unique=True).map(lambda found: [0, *sorted(found)]),
    static=st.booleans(),
)
def test_pieces_of_every_length_on_every_cache(plan, policy, cuts, static):
    """Prompts of one token, second turns of several and of one, and steps."""
    ids = tokens(1, 12)
    with plan.applied(MODEL, policy):
        wanted = in_steps(ids, cuts, static)
    with decoding(plan, MODEL, policy, threads=1):
        found = in_steps(ids, cuts, static)
    assert torch.allclose(found, wanted, atol=2e-4)


def test_a_prompt_of_one_token_is_dense():
    """The first token of a sequence stays dense (attention sinks), whatever comes with it."""
    ids = tokens(1, 1)
    with torch.inference_mode():
        dense = MODEL(input_ids=ids).logits
        with decoding(PLANS[0], MODEL, threads=1):
            assert torch.allclose(MODEL(input_ids=ids).logits, dense, atol=1e-5)
        with decoding(PLANS[0], MODEL, AllButFirst(0), threads=1):
            assert not torch.allclose(MODEL(input_ids=ids).logits, dense, atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate(policy, cache):
    """Left padding in a batch, and one row alone."""
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    options |= {"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    padded = torch.where(mask == 1, ids, 0)
    for inputs in ({"input_ids": padded, "attention_mask": mask}, {"input_ids": ids[:1]}, {"input_ids": ids[:1, :1]}):
        found = []
        for context in (PLANS[0].applied(MODEL, policy), decoding(PLANS[0], MODEL, policy, threads=1)):
            with context:
                found.append(MODEL.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True))
        assert torch.equal(found[0].sequences, found[1].sequences)
        assert torch.allclose(torch.stack(found[0].logits), torch.stack(found[1].logits), atol=2e-4)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_static_cache_is_the_dynamic_one(policy):
    """Under `applied`: the same logits and the same bytes, with padding that the static cache's mask shows."""
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    ids = torch.where(mask == 1, tokens(2, 7), 0)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    found, meters = [], [Meter(), Meter()]
    for meter, more in zip(meters, ({}, {"cache_implementation": "static", "disable_compile": True})):
        with PLANS[0].applied(MODEL, policy, meter):
            out = MODEL.generate(
                ids, attention_mask=mask, **options, **more, output_logits=True, return_dict_in_generate=True
            )
        found.append(torch.stack(out.logits))
    assert torch.allclose(found[0], found[1], atol=2e-4)
    assert meters[0].tokens == meters[1].tokens
    if meters[0].tokens:
        assert meters[0].byte_sparsity() == pytest.approx(meters[1].byte_sparsity(), abs=2e-3)


def test_saving_inside_writes_the_dense_model(tmp_path):
    wanted = {name: p.clone() for name, p in MODEL.state_dict().items()}
    for plan in PLANS:
        for context in (plan.applied(MODEL), decoding(plan, MODEL, threads=1)):
            with context:
                MODEL.save_pretrained(tmp_path)
                inside = MODEL.state_dict()
            again = type(MODEL).from_pretrained(tmp_path)
            assert inside.keys() == wanted.keys()
            assert all(torch.equal(again.state_dict()[name], p) for name, p in wanted.items())


def test_loading_inside_loads_or_is_refused():
    other = build("llama", seed=1)
    model = build("llama")
    plan = Plan({Site(0, "q"): Rule(threshold=0.2)}, "x", 0.1, 0.1, of_model(model))
    with plan.applied(model):
        told = model.load_state_dict(other.state_dict())
        assert not told.missing_keys
        assert not told.unexpected_keys
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, other.model.layers[0].self_attn.q_proj.weight)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox", "opt", "mixtral", "deepseek_v3", "qwen3_5_text"])
def test_a_family_decodes_on_a_gpu_as_it_is_applied(family, dtype):
    model = decoder_of(family).cuda().to(dtype)
    plan = masks(model)
    with plan.applied(model):
        wanted = stepped(model).float()
    with decoding(plan, model):
        found = stepped(model).float()
    # An input at its threshold may fall to either side, and what follows differs: most steps have none.
    difference = (found - wanted).abs().amax(-1) / wanted.std()
    assert float(difference.median()) < 0.02
