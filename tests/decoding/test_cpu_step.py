"""One token of a whole model on a CPU is the masked definition's, for every form, rule, dtype and context."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cpu_steps import (
    IDS,
    RULES,
    WINDOW,
    defined,
    gates,
    low_rank,
    model_of,
    off,
    step_of,
    stepped,
    thresholds,
    typical,
    vector,
)
from decoders import WITH_FORM, plan_of
from transformers import DynamicCache

from resting.sparsifier import AllButFirst, Decoder, Rule, Site, SparsifierError
from resting.sparsifier.decoding.step import cpu_program, cpu_table
from resting.sparsifier.decoding.step.cpu_kernels import KINDS
from resting.sparsifier.decoding.step.form import ACTIVATIONS
from resting.sparsifier.decoding.step.reading import read


@pytest.mark.parametrize("family", WITH_FORM)
def test_every_form_dense_and_masked(family):
    model = model_of(family)
    before = {name: p.clone() for name, p in model.named_parameters()}
    for rules in ({}, thresholds(model)):
        wanted = defined(model, rules)
        step = step_of(model, rules)
        assert off(stepped(step), wanted) < 3e-5
        step.restore()
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters())
    assert off(defined(model, thresholds(model)), defined(model, {})) > 0.05


def test_windows_are_shorter_than_the_text():
    """Of what the families above compute: some blocks have a window, and some have none."""
    found = {f: {b.attention.window for b in read(m, Decoder.of(m)).blocks} for f in WITH_FORM if (m := model_of(f))}
    assert found["mistral"] == {WINDOW}
    assert found["gemma2"] == found["gemma3_text"] == {WINDOW, None}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_kind_of_rule(family, name):
    model = model_of(family)
    rules = RULES[name](model)
    wanted = defined(model, rules)
    assert off(wanted, defined(model, {})) > 0.01
    assert off(stepped(step_of(model, rules)), wanted) < 3e-5


@pytest.mark.parametrize("rule", [None, Rule(threshold=0.3), Rule(threshold=0.3, shift=0.1, bias=vector(96, 4, 0.3))])
def test_gates_of_one_matrix(rule):
    """The gate's rows are computed, and of the others those that do not rest."""
    model = model_of("phi3")
    width = Decoder.of(model).projection(Site(0, "gate_up")).out_features
    assert width == 96
    rules = gates(model) | ({} if rule is None else {Site(i, "gate_up"): rule for i in range(3)})
    assert off(stepped(step_of(model, rules)), defined(model, rules)) < 3e-5


@pytest.mark.parametrize("rules", [lambda model: {}, thresholds], ids=["dense", "masked"])
def test_bfloat16_rounds_where_the_model_does(rules):
    """It is nearer to the model in bfloat16 than the same model in float32 is; thresholds multiply every rounding."""
    mine, exact = [], []
    for family in ("llama", "qwen2", "gemma2", "olmo2", "phi3"):
        model = model_of(family, torch.bfloat16)
        wanted, step = defined(model, rules(model)), step_of(model, rules(model))
        found = stepped(step)
        step.restore()
        assert found.dtype == torch.bfloat16
        mine.append(typical(found, wanted))
        exact.append(typical(defined(model.float(), rules(model)), wanted))
    assert sum(mine) < 0.9 * sum(exact)
    assert max(mine) < 0.3


def test_what_embeddings_are_multiplied_by_is_known_beyond_a_rounding():
    model = model_of("granite", torch.bfloat16)
    assert read(model, Decoder.of(model)).embedding_scale == pytest.approx(3.0, rel=1e-3)


@pytest.mark.parametrize("past", [1, 255, 256, 4095])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_contexts_of_every_length(family, past):
    """Keys and values of earlier tokens are random ones, the same in the store and in a cache."""
    model = model_of(family)
    rules = thresholds(model)
    step, cache = step_of(model, rules), DynamicCache(config=model.config)
    version = step.store.version
    for places in (past // 2 + 1, past + 1):  # it moves between calls, too
        step.store.ensure(places)
    assert (step.store.version > version) == (past >= 256)
    generator = torch.Generator().manual_seed(past)
    for i, (keys, values) in enumerate(zip(step.store.keys, step.store.values)):
        earlier = torch.randn(2, *keys[:, :past].shape, generator=generator)
        keys[:, :past], values[:, :past] = earlier
        cache.update(earlier[0][None], earlier[1][None], i)
    with plan_of(model, rules).applied(model, AllButFirst(0)), torch.no_grad():
        wanted = model(IDS[:, :1], past_key_values=cache).logits
    assert off(step(IDS[:, :1], past), wanted) < 3e-5
    for i, layer in enumerate(cache.layers):
        for kept, held in ((step.store.keys, layer.keys), (step.store.values, layer.values)):
            assert torch.allclose(kept[i][:, past], held[0, :, -1], atol=1e-5)


def test_a_store_that_moves_between_tokens():
    model = model_of("llama")
    step = step_of(model, {})
    first = stepped(step, IDS[:, :6])
    step.store.ensure(300)
    rest = torch.cat([step(token, 6 + i).clone() for i, token in enumerate(IDS[:, 6:].split(1, 1))], 1)
    assert off(torch.cat([first, rest], 1), defined(model, {})) < 3e-5


@pytest.mark.parametrize("rules", [thresholds, RULES["gates, and all"]], ids=["thresholds", "gates"])
def test_threads_share_products(rules, monkeypatch):
    monkeypatch.setattr(cpu_program, "ALWAYS_PARALLEL", 0)
    model = model_of("llama")
    assert off(stepped(step_of(model, rules(model), threads=2)), defined(model, rules(model))) < 3e-5


def test_threads_are_measured_where_they_may_not_pay(monkeypatch):
    asked = []
    monkeypatch.setattr(cpu_program, "threads_for", lambda weight, threads: asked.append(weight.shape) or 1)
    model = model_of("llama")
    step = step_of(model, {}, threads=2)
    assert len(set(asked)) > 2
    assert off(stepped(step), defined(model, {})) < 3e-5


def test_weights_that_were_changed_are_read_again():
    model, other = model_of("qwen2"), model_of("qwen2")
    rules = thresholds(model)
    step = step_of(model, rules)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.25
        for mine, its in zip(model.parameters(), other.parameters()):
            if mine.dim() == 1:
                mine.copy_(its)
            else:
                mine.data = its.clone()
    step.renew()
    assert off(stepped(step), defined(other, rules)) < 3e-5
    step.restore()
    assert all(p.is_contiguous() and torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))


def test_no_second_copy_of_weights_is_held():
    model = model_of("llama")
    step = step_of(model, thresholds(model))
    addresses = {p.data_ptr() for p in model.parameters() if p.dim() == 2}
    table = step._program[0]
    products = table[table[:, cpu_table.OP] == cpu_table.COLUMNS]
    assert len(products) == 7 * 3 + 1
    assert {int(address) for address in products[:, cpu_table.W]} <= addresses


def test_what_no_kernel_takes_is_refused():
    model = model_of("llama")
    refused = {
        "topk": {Site(0, "q"): Rule(topk=3)},
        "a shift or a low-rank part": {Site(0, "q"): Rule(0.1, shift=0.1, low_rank=low_rank(32, 32, 0))},
        "low-rank part at up": gates(model) | {Site(1, "up"): Rule(0.1, low_rank=low_rank(48, 32, 0))},
    }
    for reason, rules in refused.items():
        with pytest.raises(SparsifierError, match=reason):
            step_of(model, rules)
        assert all(p.is_contiguous() for p in model.parameters())
    with pytest.raises(SparsifierError, match="float32, bfloat16, not float64"):
        step_of(model_of("llama", torch.float64), {})


def test_a_place_that_the_store_lacks_is_refused():
    step = step_of(model_of("llama"), {})
    with pytest.raises(SparsifierError, match="room for 256 tokens, none for the token at place 256"):
        step(IDS[:, :1], 256)


@pytest.mark.parametrize("name", KINDS)
def test_gates_open_as_torch_opens_them(name):
    x = torch.cat([torch.linspace(-90.0, 90.0, 2001), torch.tensor([0.0, math.nan, 1e30, -1e30, 1e-30])])
    program, found = cpu_program.CpuProgram(torch.float32, 1), x.clone()
    program.open(KINDS[name], program.hold(found), len(x))
    *table, scratch = program.finished()
    cpu_table.runner(1, False)(*table, 0, np.arange(1), *scratch, np.empty(1, np.float32))
    wanted = ACTIVATIONS[name](x.double()).float()
    assert torch.allclose(found, wanted, rtol=3e-6, atol=1e-7, equal_nan=True)
