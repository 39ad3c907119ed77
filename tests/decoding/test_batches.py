"""Products of two to four tokens in one pass over the weights, and the models that decode small batches by them."""

from __future__ import annotations

import pytest
import torch
from decoders import decoder_of, masks, plan_of
from gpu_products import DEVICE, DTYPES, FEW, MASKED, Operators, close, draw, kept_of
from hypothesis import given
from hypothesis import strategies as st

from resting.sparsifier import AllButFirst, Decoder, Rule, Site, SparsifierError
from resting.sparsifier.decoding import batches, cuda_union, decoding, products
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns
from resting.sparsifier.decoding.cuda_union import CudaUnion

PLAIN = [at for at in MASKED if not at.atomic]


@FEW
@given(
    *(st.integers(2, 4), st.integers(1, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(PLAIN)),
    *(st.booleans(), st.booleans(), st.booleans(), st.integers(0, 10**6)),
)
def test_every_token_has_the_formula_s_product(tokens, inputs, outputs, dtype, launch, uniform, moves, biased, seed):
    wide, x, shift = draw(seed, dtype, (inputs, 8 + outputs), (tokens, 1, inputs), (inputs,))
    weight = wide[:, 8:].t()  # a part of wider rows
    threshold, scale, bias = (torch.rand(n) for n in (inputs, inputs, outputs))
    if moves:  # differences that no rounding touches: the interpreter cuts bfloat16 off where a GPU rounds
        x, shift = ((v * 8).round().clamp(-31, 31) / 8 for v in (x, shift))
    rule = Rule(
        threshold=0.7 if uniform else threshold,
        scale=1.0 if uniform else scale + 0.5,
        shift=shift.float() if moves else 0.0,
    )
    product = CudaUnion(rule, inputs, dtype, x.device)
    found = product(x, weight, bias.to(DEVICE) if biased else None, launch)
    assert found.shape == (tokens, 1, outputs)
    assert found.dtype == dtype
    wanted = torch.stack([kept_of(token[0], rule) for token in x]) @ weight.double().T
    assert close(found[:, 0], wanted + (bias.to(DEVICE).double() if biased else 0.0), dtype)


@pytest.mark.parametrize(
    ("tokens", "launch"), [(1, at) for at in MASKED] + [(n, at) for n in (2, 3, 4) for at in PLAIN]
)
def test_what_rests_for_all_tokens_is_not_read(tokens, launch):
    w, x = draw(7, torch.bfloat16, (40, 100), (tokens, 1, 100))
    rests = (x.double().abs() <= 0.6).all(0)[0]
    assert 2 < rests.sum() < 97
    poisoned = torch.where(rests, torch.nan, w)
    rule = Rule(threshold=0.6)
    if tokens == 1:
        found = CudaColumns(input_major(poisoned), [(40, rule)], launch=launch)(x)
    else:
        found = CudaUnion(rule, 100, w.dtype, w.device)(x, input_major(poisoned), None, launch)
    wanted = torch.stack([kept_of(token[0], rule) for token in x]) @ w.double().T
    assert close(found[:, 0], wanted, torch.bfloat16)


def test_a_token_that_is_not_a_number_leaves_the_others_alone():
    w, x = draw(8, torch.float16, (20, 50), (3, 1, 50))
    x[1, 0, 4] = torch.nan
    found = CudaUnion(Rule(threshold=0.6), 50, w.dtype, w.device)(x, input_major(w), None, MASKED[1])
    assert found[1].isnan().all()
    assert torch.isfinite(found[[0, 2]]).all()


def test_the_operator_is_registered_as_torch_asks():
    w, x = draw(1, torch.bfloat16, (32, 48), (3, 1, 48))
    product = CudaUnion(Rule(threshold=0.5), 48, w.dtype, w.device)
    with Operators() as operators:
        product(x, input_major(w), torch.zeros(32, device=DEVICE), MASKED[0])
    operators.check(1)


def test_what_products_of_several_tokens_do_not_take_is_refused():
    w, u, v, x = draw(2, torch.bfloat16, (32, 48), (32, 4), (4, 48), (5, 1, 48))
    product = CudaUnion(Rule(threshold=0.5), 48, w.dtype, w.device)
    with pytest.raises(SparsifierError, match="take 2 to 4 of 48 inputs, not \\[5, 1, 48\\]"):
        product(x, input_major(w))
    with pytest.raises(SparsifierError, match="input-major"):
        product(x[:2], w)
    with pytest.raises(SparsifierError, match="no low-rank part"):
        CudaUnion(Rule(threshold=0.5, low_rank=(u, v)), 48, w.dtype, w.device)


def test_the_kernel_is_used_from_where_on_it_is_always_faster():
    dense = 10.0
    assert cuda_union.least_of([9.0, 8.0, 7.0, 6.0, 5.0, 4.0], dense) == cuda_union.RESTS[0]
    assert cuda_union.least_of([9.0, 11.0, 9.0, 8.0, 7.0, 6.0], dense) == cuda_union.RESTS[2]
    assert cuda_union.least_of([9.0, 8.0, 7.0, 6.0, 5.0, 11.0], dense) == cuda_union.NEVER


@pytest.fixture
def used(monkeypatch):
    """Small batches go through the kernel on any device; gives the numbers of tokens that it was called with."""
    seen = []
    own = CudaUnion.forward

    def forward(self, x, *more):
        seen.append(len(x))
        return own(self, x, *more)

    monkeypatch.setattr(CudaUnion, "forward", forward)
    monkeypatch.setattr(cuda_union, "SMALLEST", cuda_union.SMALLEST._replace(inputs=64, outputs=64))
    monkeypatch.setattr(products, "takes_batches", lambda weight: True)
    monkeypatch.setattr(products, "union_break_even", lambda weight, tokens: 0.0)
    return seen


def in_turn(model, ids, prompt=3, **more):
    out = model(ids[:, :prompt], use_cache=True, **more)
    logits = [out.logits[:, -1:]]
    for i in range(prompt, ids.shape[1]):
        if "attention_mask" in more:
            more["attention_mask"] = torch.cat([more["attention_mask"], torch.ones(len(ids), 1).long()], 1)
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True, **more)
        logits.append(out.logits)
    return torch.cat(logits, 1)


def some(rows):
    return torch.randint(3, 97, (rows, 5), generator=torch.Generator().manual_seed(rows))


@pytest.mark.skipif(DEVICE != "cpu", reason="CPU tensors need Triton's interpreter")
@pytest.mark.parametrize(("rows", "by_layer"), [(2, True), (4, False), (5, False)])
@torch.no_grad()
def test_a_model_decodes_small_batches_as_defined(rows, by_layer, used, monkeypatch):
    model = decoder_of("llama")
    plan, ids = masks(model), some(rows)
    with plan.applied(model):
        wanted = in_turn(model, ids)
    if by_layer:
        monkeypatch.setattr("resting.sparsifier.decoding.decoder.known_form", lambda *args: None)
        monkeypatch.setattr("resting.sparsifier.decoding.decoder.break_even", lambda *args: 0.0)
    before = dict(model.named_modules())
    with decoding(plan, model, threads=1):
        found = in_turn(model, ids)
    assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
    assert bool(used) == (2 <= rows <= 4)
    assert set(used) <= {rows}
    assert all(before[name] is module for name, module in model.named_modules())


@pytest.mark.skipif(DEVICE != "cpu", reason="CPU tensors need Triton's interpreter")
@torch.no_grad()
def test_what_the_kernel_does_not_compute_in_batches_is_the_definition_s(used):
    model = decoder_of("llama")
    width = model.config.hidden_size
    u, v = torch.randn(width, 2), torch.randn(2, width)
    low_rank = plan_of(model, {Site(0, "o"): Rule(threshold=0.01, low_rank=(u, v))})
    unmasked = plan_of(model, {Site(0, "q"): Rule()})
    replaced = plan_of(model, {Site(0, "o"): Rule(threshold=0.01, weight=torch.randn(width, width))})
    padded = torch.tensor([[0, 1, 1], [1, 1, 1]])  # one sequence has fewer dense tokens than its batch
    for plan, more in ((low_rank, {}), (unmasked, {}), (replaced, {}), (masks(model), {"attention_mask": padded})):
        with plan.applied(model, AllButFirst(4)):
            wanted = in_turn(model, some(2), **more)
        with decoding(plan, model, AllButFirst(4), threads=1):
            found = in_turn(model, some(2), **more)
        assert (found - wanted).abs().max() < 2e-5 * wanted.abs().max()
        assert len(used) <= (7 if more else 0)  # the last token alone is sparse in both


@pytest.mark.skipif(DEVICE != "cpu", reason="CPU tensors need Triton's interpreter")
def test_gradients_and_batches_without_a_prompt_go_through_the_definition(used):
    model = decoder_of("llama")
    plan, ids = masks(model), some(2)
    with decoding(plan, model, AllButFirst(0), threads=1):
        model(ids[:, :1], use_cache=True)  # no prompt has told what rests
        assert not used
        out = model(ids[:, :3], use_cache=True)
        model(ids[:, 3:4], past_key_values=out.past_key_values, use_cache=True).logits.sum().backward()
    assert not used
    assert all(p.grad is not None for p in Decoder.of(model).layers.parameters())


@torch.no_grad()
def test_a_prompt_decides_by_what_rests_for_all_of_its_sequences(monkeypatch, used):
    model = decoder_of("llama")
    layers = []
    own = batches.in_batches
    monkeypatch.setattr(batches, "in_batches", lambda masked: layers.append(own(masked)) or layers[-1])
    monkeypatch.setattr(products, "union_break_even", lambda weight, tokens: 0.4)
    same, other = some(1).expand(2, -1), some(2)
    plan = plan_of(model, {site: Rule(threshold=0.5) for site in Decoder.of(model).sites() if site.role == "q"})
    with decoding(plan, model, threads=1):
        for ids in (same, other):
            model(ids, use_cache=True)
            shares = []
            for layer in layers:
                x = layer_input(model, layer, ids)
                shares.append(float((x.abs() <= 0.5).all(0).float().mean()))
            assert [layer.pays == 2 for layer in layers] == [share >= 0.4 for share in shares]


def layer_input(model, layer, ids):
    found = []
    handle = layer.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    model(ids)
    handle.remove()
    return found[0]
