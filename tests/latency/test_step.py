"""A step of few launches against the model it stands for, dense and under plans."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from families import SMALL, build
from transformers import AutoModelForCausalLM, MistralConfig

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency.decode import neutral
from resting.benchmarks.latency.gpu.step import Step
from resting.benchmarks.latency.gpu.weights import fuse
from resting.method.mean_error import MeanError
from resting.sparsifier import AllButFirst, Calibration, Rule, Site, SparsifierError
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
METHODS = [Teal(target=0.4), Cats(target=0.2), Chess(target=0.3), RSparse(target=0.4), MeanError(Teal(target=0.4))]


def decoded(step, ids):
    out = []
    with torch.inference_mode():
        for token in ids[0]:
            step.token.fill_(token)
            out.append(step().clone())
    return torch.cat(out, 1)


@interpreted
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


@interpreted
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


@interpreted
def test_an_act_mask_beside_a_mask_of_up_is_the_plan():
    model = build("llama")
    windows = torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(0))
    plan = METHODS[1].fit(model, Calibration(windows))
    plan = replace(plan, rules=plan.rules | {Site(block, "up"): Rule(threshold=0.3) for block in range(3)})
    with torch.inference_mode(), plan.applied(model, AllButFirst(0)):
        wanted = model(input_ids=windows[:1, :6]).logits
    step = Step(model, fuse(model), 16, plan.rules, model.get_output_embeddings())
    assert torch.allclose(decoded(step, windows[:1, :6]), wanted, atol=2e-4)


@interpreted
def test_an_output_layer_of_kernels_takes_the_last_norm():
    model = build("llama")
    ids = torch.randint(3, 97, (1, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(input_ids=ids).logits
        head = model.get_output_embeddings().weight
        product = CudaColumns(input_major(head.detach()), [(head.shape[0], Rule())])
        for rules in (None, neutral(model).rules):
            assert torch.allclose(decoded(Step(model, fuse(model), 16, rules, product), ids), wanted, atol=2e-4)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"hidden_act": "gelu"}, SparsifierError, "kernels open a gate by silu, not by gelu"),
        ({"head_dim": 24}, SuiteError, "heads of 2\\^n numbers, and these have 24"),
        ({"sliding_window": 8}, SuiteError, "16 are more than a window of 8"),
    ],
)
def test_what_a_step_is_not_written_for_is_refused(change, error, match):
    config = MistralConfig(**SMALL | {"sliding_window": None} | change)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(error, match=match):
        Step(model, fuse(model), 16, neutral(model).rules, model.get_output_embeddings())


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
    with pytest.raises(SuiteError, match=r"Gemma3ForCausalLM: a step is written for llama, .*, not for gemma3"):
        fuse(build("gemma3"))
