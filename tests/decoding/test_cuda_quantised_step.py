"""The step of a GPU with the codes of a quantised model, against the masked definition with what they stand for."""

from __future__ import annotations

import pytest
import torch
from decoders import masks, plan_of
from transformers import AutoConfig, AutoModelForCausalLM

from resting.baselines.cats import Cats
from resting.sparsifier import AllButFirst, CalibratedModel, Calibration, Decoder, Rule, Site
from resting.sparsifier.decoding.step.cuda_step import CudaStep
from resting.sparsifier.decoding.step.places import Places
from resting.sparsifier.decoding.step.reading import read
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import quantise

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # in the interpreter no rounding decides
IDS = torch.randint(3, 97, (1, 3), generator=torch.Generator().manual_seed(4))
WINDOWS = Calibration(torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(2)))
FORMATS = ["int4-g32", "int8-g32"]
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="in 16 bits a rounding decides about a mask")


def model_in(name, family="llama", layers=1):
    config = AutoConfig.for_model(
        family,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=97,
        max_position_embeddings=64,
        **({"pad_token_id": 0} if family == "phi3" else {}),
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=DTYPE).to(DEVICE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    quantise(model, Format.parse(name))
    return model


@torch.no_grad()
def compare(model, plan):
    with plan.applied(model, AllButFirst(0)):
        wanted = model(IDS.to(DEVICE)).logits
    decoder = Decoder.of(model)
    form = read(model, decoder)
    shapes = [(block.attention.groups, block.attention.size, block.attention.size) for block in form.blocks]
    step = CudaStep(model, form, decoder, plan.rules, Places(shapes, DTYPE, DEVICE))
    found = torch.cat([step(IDS[:, i : i + 1].to(DEVICE), i).clone() for i in range(IDS.shape[1])], 1)
    kernels = step.kernels
    step.restore()
    assert torch.allclose(found, wanted, atol=(2e-5 if torch.float32 == DTYPE else 4e-2) * float(wanted.abs().max()))
    assert all(p.is_contiguous() for p in model.parameters())
    return kernels


@interpreted
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gemma2"])
def test_masks_at_every_site(family, name):
    model = model_in(name, family)
    kernels = compare(model, masks(model))
    assert {label.split(",")[0] for label in kernels} == {name}


@pytest.mark.parametrize("name", FORMATS)
def test_nothing_at_rest(name):
    model = model_in(name)
    compare(model, plan_of(model, {site: Rule() for site in Decoder.of(model).sites()}))


@interpreted
@pytest.mark.parametrize("name", FORMATS)
def test_masks_of_the_activated_gate(name):
    model = model_in(name)
    compare(model, Cats(0.3).plan_for(CalibratedModel(model, WINDOWS)))


@interpreted
@pytest.mark.parametrize("name", FORMATS)
def test_biases_and_low_rank_parts(name):
    model = model_in(name)
    generator = torch.Generator().manual_seed(7)
    u, v = torch.randn(64, 3, generator=generator) / 10, torch.randn(3, 96, generator=generator) / 10
    rules = {Site(0, "down"): Rule(threshold=0.2, bias=torch.randn(64, generator=generator), low_rank=(u, v))}
    compare(model, plan_of(model, rules | {Site(0, "q"): Rule(threshold=0.4)}))
