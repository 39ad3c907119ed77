"""Codes are dequantised as their method says, and rows tell it, or they are refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import tiny
import torch
from decoders import FAMILIES
from families import SMALL
from gguf_files import logits
from model_folders import UP, change, configure
from transformers import AutoConfig, AutoModelForCausalLM

from resting.benchmarks.assets import models
from resting.benchmarks.errors import ModelError
from resting.sparsifier import Decoder, Site
from resting.sparsifier.fingerprint import of_model
from resting.sparsifier.quantised.model import codes_of
from resting.sparsifier.quantised.nearest import quantised


def quantise(tensors: dict[str, torch.Tensor], block: int = 16) -> dict[str, torch.Tensor]:
    """FP8 with a scale for each block, in place; what the weights stand for."""
    plain = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name]
        out, width = weight.shape
        scales = torch.rand(-(-out // block), -(-width // block)) + 0.5
        tensors[name] = weight.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scales
        wide = scales.repeat_interleave(block, 0)[:out].repeat_interleave(block, 1)[:, :width]
        plain[name] = tensors[name].float() * wide
    return plain


FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic", "fmt": "e4m3"}


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8, torch.uint8, torch.int32])
def test_codes_without_an_explanation_are_refused(folder, kind):
    change(folder, lambda tensors: tensors.update({UP: (tensors[UP] * 50).to(kind)}))
    with pytest.raises(
        ModelError, match=f"has the weights {UP} as .*, and its config.json does not say what they stand"
    ):
        models.resolve(str(folder))


@pytest.mark.parametrize("method", ["foo", "gptq", "awq", "bitsandbytes", "compressed-tensors", None])
def test_a_quantised_checkpoint_that_is_not_dequantised_is_refused(folder, method):
    configure(folder, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(
        ModelError, match=f"is quantised by {method!r} .*; allowed: fp8, mxfp4, which is dequantised, or plain"
    ):
        models.resolve(str(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_is_dequantised_and_says_so(folder, dtype):
    found = {}
    change(folder, lambda tensors: found.update(quantise(tensors)))
    configure(folder, quantization_config=FP8)
    source = models.resolve(str(folder))
    assert source.name == "model (FP8, dequantised)"
    model = source.load(dtype)
    for name, weight in found.items():
        parameter = model.get_parameter(name)
        assert parameter.dtype == dtype
        torch.testing.assert_close(
            parameter.data, weight.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 0, atol=0
        )
    assert torch.isfinite(logits(model)).all()


def test_fp8_without_its_scales_is_refused(folder):
    change(folder, lambda tensors: [quantise(tensors), tensors.pop(f"{UP}_scale_inv")])
    configure(folder, quantization_config=FP8)
    with pytest.raises(ModelError, match=f"has the weights {UP} as F8_E4M3 without their scales"):
        models.resolve(str(folder))


FP4 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


@pytest.fixture
def experts_in_mxfp4(tmp_path):
    """A gpt-oss as it is published: experts in four bits, 32 with one exponent; and what they stand for."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 16}
    made = AutoConfig.for_model("gpt_oss", **(SMALL | FAMILIES["gpt_oss"] | sizes))
    model, plain, codes = AutoModelForCausalLM.from_config(made), {}, {}
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, width, out = parameter.shape
            number = torch.randint(0, 16, (experts, out, width // 32, 32))
            exponent = torch.randint(121, 125, (experts, out, width // 32))
            values = torch.cat([FP4, -FP4])[number] * torch.exp2((exponent - 127).float())[..., None]
            plain[name] = values.reshape(experts, out, width).transpose(1, 2)
            codes[f"{name}_blocks"] = (number[..., ::2] | number[..., 1::2] << 4).to(torch.uint8)
            codes[f"{name}_scales"] = exponent.to(torch.uint8)
    folder = tmp_path / "gpt-oss"
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    change(folder, lambda tensors: [tensors.pop(name) for name in plain] + [tensors.update(codes)])
    configure(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder, plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mxfp4_is_dequantised_and_says_so(experts_in_mxfp4, dtype):
    folder, plain = experts_in_mxfp4
    source = models.resolve(str(folder))
    assert source.name == "gpt-oss (MXFP4, dequantised)"
    model = source.load(dtype)
    for name, weight in plain.items():
        assert model.get_parameter(name).dtype == dtype
        assert torch.equal(model.get_parameter(name).data, weight.to(dtype))


def test_mxfp4_without_its_scales_is_refused(experts_in_mxfp4):
    folder, plain = experts_in_mxfp4
    first = next(iter(plain))
    change(folder, lambda tensors: tensors.pop(f"{first}_scales"))
    with pytest.raises(ModelError, match=f"has the weights {first}_blocks as U8 without their scales, {first}_scales"):
        models.resolve(str(folder))


def test_scales_of_another_name_than_those_of_the_method_are_refused(folder):
    def renamed(tensors: dict[str, torch.Tensor]) -> None:
        quantise(tensors)
        for name in [name for name in tensors if name.endswith("_scale_inv")]:
            tensors[name.replace("_scale_inv", "_scale")] = tensors.pop(name)

    change(folder, renamed)
    configure(folder, quantization_config=FP8)
    with pytest.raises(ModelError, match="without their scales"):
        models.resolve(str(folder))


def test_codes_are_the_same_in_every_dtype(folder):
    """Those of weights rounded to bfloat16 before would be others: quality and time would be of two models."""
    source = replace(models.resolve(str(folder)), weights="int8-g16")
    wide, narrow = source.load(torch.float32), source.load(torch.bfloat16)
    (form, codes), (same, others) = codes_of(wide), codes_of(narrow)
    assert form == same
    assert all(torch.equal(codes[site].codes, others[site].codes) for site in codes)
    assert all(torch.equal(codes[site].scales, others[site].scales) for site in codes)
    assert of_model(narrow) == of_model(wide)
    rounded = models.resolve(str(folder)).load(torch.bfloat16)
    nearest = quantised(Decoder.of(rounded).projection(Site(0, "up")).weight, form)
    assert not torch.equal(nearest.scales, codes[Site(0, "up")].scales)


def test_weights_of_files_in_the_same_dtype_are_loaded_once(folder, monkeypatch):
    change(folder, lambda tensors: tensors.update({name: t.bfloat16() for name, t in tensors.items()}))
    source = replace(models.resolve(str(folder)), weights="int8-g16")
    loaded = []
    plain = models.ModelSource._plain
    monkeypatch.setattr(models.ModelSource, "_plain", lambda self, *about: loaded.append(about) or plain(self, *about))
    narrow = source.load(torch.bfloat16)
    assert loaded == [(torch.bfloat16, "cpu")]
    assert of_model(narrow) == of_model(source.load(torch.float32))
