"""A step of few launches against the model it stands for, dense and under plans."""

from __future__ import annotations

import pytest
import torch
from conftest import build

from baselines.cats import Cats
from baselines.chess import Chess
from baselines.rsparse import RSparse
from baselines.teal import Teal
from benchmarks.errors import SuiteError
from benchmarks.latency.step import Step
from benchmarks.latency.weights import fuse
from method.mean_error import MeanError
from sparsifier import AllButFirst, Calibration, Rule, Site, SparsifierError
from sparsifier.sites import Decoder

METHODS = [Teal(target=0.4), Cats(target=0.2), Chess(target=0.3), RSparse(target=0.4), MeanError(Teal(target=0.4))]


def decoded(step, ids):
    out = []
    with torch.inference_mode():
        for token in ids[0]:
            step.token.fill_(token)
            out.append(step().clone())
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_dense_step_is_the_model(family):
    model = build(family)
    ids = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        step = Step(model, fuse(model), 16, None, model.get_output_embeddings())
        assert torch.allclose(decoded(step, ids), wanted, atol=1e-5)
        assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-6)  # the model itself is as it was


CASES = [("llama", method) for method in METHODS] + [("qwen2", METHODS[0])]


@pytest.mark.parametrize(("family", "method"), CASES, ids=lambda v: v if isinstance(v, str) else v.label)
def test_a_sparse_step_is_the_plan(family, method):
    model = build(family)
    windows = torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(0))
    fused = fuse(model)
    plan = method.fit(model, Calibration(windows))
    ids = windows[:1, :6]
    with torch.inference_mode(), plan.applied(model, AllButFirst(0)):
        wanted = model(input_ids=ids).logits
    step = Step(model, fused, 16, plan.rules, model.get_output_embeddings())
    assert torch.allclose(decoded(step, ids), wanted, atol=2e-4)


def test_an_act_mask_with_a_low_rank_part_at_up_is_refused():
    model = build("llama")
    plan = METHODS[1].fit(model, Calibration(torch.randint(3, 97, (8, 24))))
    low_rank = torch.ones(48, 2), torch.ones(2, 32)
    rules = plan.rules | {Site(0, "up"): Rule(low_rank=low_rank)}
    with pytest.raises(SparsifierError, match="low-rank part at up"):
        Step(model, fuse(model), 16, rules, model.get_output_embeddings())


def test_there_is_one_copy_of_each_order():
    model = build("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    fused = fuse(model)
    decoder = Decoder.of(model)
    for weights in fused:
        for of in weights.values():
            for site, part in zip(of.sites, of.usual.split(of.widths)):
                assert decoder.linear(site).weight.data_ptr() == part.data_ptr()
            assert torch.equal(of.usual, of.major)
            assert of.major.stride(0) == 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name])


def test_another_block_is_refused():
    with pytest.raises(SuiteError, match="Gemma3ForCausalLM: a step is written for blocks of self_attn, mlp"):
        fuse(build("gemma3"))
