"""The step of a GPU on a GPU: graphs, tokens begun ahead, contexts of up to 4,096 tokens, both dtypes, all families."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import WITH_FORM, decoder_of, masks, plan_of

from resting.benchmarks.latency import random_models
from resting.sparsifier import Decoder, Rule
from resting.sparsifier.decoding import cuda_forms, cuda_layouts, decoding, products
from resting.sparsifier.decoding.cuda_union import CudaUnion
from resting.sparsifier.decoding.step import ahead, by_step
from resting.sparsifier.decoding.step.by_step import step_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SMALL = {"num_hidden_layers": 3, "vocab_size": 2048, "max_position_embeddings": 8192}
WINDOW = 6


@pytest.fixture
def few_layouts(monkeypatch):
    monkeypatch.setattr(cuda_layouts, "TILES", cuda_layouts.TILES[:1])
    monkeypatch.setattr(cuda_layouts, "RESIDENT", (4,))
    monkeypatch.setattr(cuda_forms, "MASKED", cuda_forms.MASKED[:1])


@pytest.fixture
def any_dtype(monkeypatch):
    """Float32 as well, in which no rounding decides about a mask; TF32 is off by default."""
    monkeypatch.setattr(by_step, "check", lambda dtype, device: None)


def in_turn(model, ids, prompt=4):
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits[:, -1:]]
    for i in range(prompt, ids.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)


@pytest.mark.parametrize("family", WITH_FORM)
@torch.no_grad()
def test_every_family_decodes_as_defined(family, few_layouts, any_dtype):
    model = decoder_of(family).cuda()
    for module in (model.config, *model.modules()):
        if getattr(module, "sliding_window", None):
            module.sliding_window = WINDOW
    ids = torch.randint(3, 97, (1, 3 * WINDOW), generator=torch.Generator().manual_seed(1)).cuda()
    plan = masks(model)
    with plan.applied(model):
        wanted = in_turn(model, ids)
    with decoding(plan, model):
        assert step_of(model) is not None
        found = in_turn(model, ids)
    assert (found - wanted).abs().max() < 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("rows", [2, 3, 4])
@torch.no_grad()
def test_small_batches_decode_as_defined(rows, few_layouts, any_dtype, monkeypatch):
    """Weights that are written to are seen, as they are by single tokens."""
    seen = []
    own = CudaUnion.forward
    monkeypatch.setattr(CudaUnion, "forward", lambda self, x, *more: seen.append(len(x)) or own(self, x, *more))
    monkeypatch.setattr(products, "union_break_even", lambda weight, tokens: 0.0)
    model = decoder_of("llama").cuda()
    ids = torch.randint(3, 97, (rows, 8), generator=torch.Generator().manual_seed(1)).cuda()
    plan, decoder = masks(model), Decoder.of(model)
    first = decoder.projection(decoder.sites()[0])
    with decoding(plan, model):
        found = [in_turn(model, ids)]
        model.model.norm.weight.mul_(2.0)
        first.weight.mul_(0.5)
        found.append(in_turn(model, ids[:1]).expand(1, -1, -1))
        found.append(in_turn(model, ids))
    assert set(seen) == {rows}
    with plan_of(model, plan.rules).applied(model):
        wanted = in_turn(model, ids)
    assert (found[2] - wanted).abs().max() < 1e-4 * wanted.abs().max()
    assert (found[1] - wanted[:1]).abs().max() < 1e-4 * wanted.abs().max()


def shaped(dtype, threshold):
    """A few blocks in the shape of Llama-3-8B, and a plan with masks at all sites."""
    model = random_models.random_model("llama-3-8b", dtype, "cuda", **SMALL)
    sites = Decoder.of(model).sites()
    wide = {site: threshold if site.role in ("q", "k", "v", "gate", "up") else threshold / 60 for site in sites}
    return model, plan_of(model, {site: Rule(threshold=value) for site, value in wide.items()})


def tokens(count):
    return torch.randint(3, SMALL["vocab_size"], (1, count), generator=torch.Generator().manual_seed(0)).cuda()


@torch.no_grad()
def test_long_contexts_are_the_definition_s(few_layouts, any_dtype):
    """The step and the definition after one and the same cache."""
    model, plan = shaped(torch.float32, 0.6)
    ids = tokens(4097)
    with decoding(plan, model):
        for n in (1, 2, 63, 64, 65, 255, 256, 257, 1000, 4095, 4096):
            cache = model(ids[:, :n], use_cache=True).past_key_values
            ask = {"input_ids": ids[:, n : n + 1], "use_cache": True}
            wanted = model(**ask, past_key_values=copy.deepcopy(cache), output_hidden_states=True).logits
            found = model(**ask, past_key_values=cache).logits
            assert step_of(model).store.places >= n + 1
            assert (found - wanted).norm() < 1e-3 * wanted.norm(), n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_step_is_as_near_to_float32_as_the_library(dtype, few_layouts):
    model, plan = shaped(dtype, 0.0)
    ids = tokens(301)
    library = model(ids).logits[:, -1].float()
    with decoding(plan, model):
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        found = model(ids[:, -1:], past_key_values=cache).logits[:, -1].float()
    exact = model.float()(ids).logits[:, -1]
    assert (found - exact).norm() < 1.5 * (library - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_looking_ahead_changes_no_bit(dtype, few_layouts, monkeypatch):
    model, plan = shaped(dtype, 0.6)
    ids = tokens(40)
    found = []
    for hits in (2, 1 << 30):  # the latter are never reached
        monkeypatch.setattr(ahead, "HITS", hits)
        with decoding(plan, model):
            asked = {"max_new_tokens": 300, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
            out = model.generate(ids[:, :16], **asked, output_logits=True, return_dict_in_generate=True)
            cache = out.past_key_values
            second = model(ids[:, 16:24], past_key_values=cache).logits  # a second turn
            more = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(24, 30)]
            cache.crop(20)
            again = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(30, 36)]
            found.append([out.sequences, torch.stack(out.logits), second, torch.cat(more), torch.cat(again)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


@torch.no_grad()
def test_weights_that_change_are_seen_and_memory_is_given_back(few_layouts):
    model, plan = shaped(torch.bfloat16, 0.6)
    ids = tokens(8)
    with decoding(plan, model):
        cache = model(ids[:, :4], use_cache=True).past_key_values
        before = model(ids[:, 4:5], past_key_values=copy.deepcopy(cache)).logits
        model.model.norm.weight.mul_(2.0)
        after = model(ids[:, 4:5], past_key_values=cache).logits
        assert (after - 2 * before).abs().max() < 0.05 * after.abs().max()
    held = torch.cuda.memory_allocated()
    with decoding(plan_of(model, plan.rules), model):
        model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.cuda.memory_allocated() < held + (1 << 24)
    assert all(p.is_contiguous() for p in model.parameters())
