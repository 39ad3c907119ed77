"""Weights that are not what they look like: quantised, parametrised, shared, adapted, or not there."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn
from torch.nn.utils import parametrize

from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.baselines.wina import Wina
from resting.method.mean_error import MeanError
from resting.sparsifier import Decoder, Plan, Rule, Site, Statistics, UnsupportedModelError, fingerprint
from resting.sparsifier.weights import check_weights


class Codes(torch.Tensor):
    """A tensor whose numbers mean something else, as those of torchao and quanto."""


class EightBit(nn.Linear):
    """A linear layer of integer codes with a scale."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        scale = linear.weight.abs().max() / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.register_buffer("scale", scale)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() * self.scale)


class Scaled(nn.Linear):
    """A linear layer of floats with a scale beside them."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.weight = linear.weight
        self.weight_scale = nn.Parameter(torch.tensor(2.0))


class Rounding(nn.Linear):
    """A linear layer that rounds its weights as it runs."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.round())


def exchange(model, make):
    slot = Decoder.of(model).slots[Site(1, "up")]
    setattr(slot.parent, slot.attribute, make(slot.module))


def set_weight(model, make):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(make(linear.weight.data), requires_grad=False)


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def rounding(linear):
    other = Rounding(linear.in_features, linear.out_features, bias=False)
    other.weight = linear.weight
    return other


BROKEN = {
    "1.up is a EightBit whose weight is int8; allowed: float16, bfloat16, float32": lambda m: exchange(m, EightBit),
    "1.up is a Scaled that holds weight_scale beside weight and bias": lambda m: exchange(m, Scaled),
    "1.up is a Rounding that computes something else": lambda m: exchange(m, rounding),
    "1.up is a Linear whose weight is a Codes, not a plain tensor": lambda m: set_weight(
        m, lambda w: w.as_subclass(Codes)
    ),
    "1.up is a Linear whose weight is float8_e4m3fn": lambda m: set_weight(m, lambda w: w.to(torch.float8_e4m3fn)),
    "1.up is a Linear whose weight is [768, 1] and not [48, 32]": lambda m: set_weight(
        m, lambda w: w.flatten()[:768, None]
    ),
    "1.up is a Linear whose weight is on the meta device or offloaded": lambda m: m.model.layers[1].mlp.up_proj.to(
        "meta"
    ),
    "1.up is a ParametrizedLinear": lambda m: parametrize.register_parametrization(
        m.model.layers[1].mlp.up_proj, "weight", Half()
    ),
    "one layer stands at 0.q and at 1.q: a rule belongs to one site": lambda m: m.model.layers.__setitem__(
        1, m.model.layers[0]
    ),
}


@pytest.mark.parametrize("said", BROKEN)
def test_weights_that_are_not_plain_are_refused_by_name(said, llama, calibration, monkeypatch):
    BROKEN[said](llama)
    monkeypatch.setattr(fingerprint, "of_model", lambda model: "m")
    runs = [
        lambda: Teal(target=0.5).fit(llama, calibration),
        lambda: MeanError(Teal(target=0.5)).fit(llama, calibration),
        lambda: Wina(target=0.5).fit(llama, calibration),
        lambda: RSparse(target=0.5).fit(llama, calibration),
        lambda: Statistics.collect(llama, calibration),
        lambda: Plan({Site(0, "q"): Rule()}, "x", 0.5, 0.5, "m").applied(llama).__enter__(),
        lambda: Plan({Site(0, "q"): Rule()}, "x", 0.5, 0.5, "m").folded(llama).__enter__(),
    ]
    for run in runs:
        with pytest.raises(UnsupportedModelError) as raised:
            run()
        assert said in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_weights_pass(model, dtype):
    check_weights(Decoder.of(model.to(dtype)))


def test_bitsandbytes(llama, calibration):
    bnb = pytest.importorskip("bitsandbytes")

    def nf4(linear):
        out = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        out.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return out

    exchange(llama, nf4)
    with pytest.raises(UnsupportedModelError, match="is a Linear4bit whose weight is a Params4bit"):
        Teal(target=0.5).fit(llama, calibration)
    model = build("llama")
    exchange(model, lambda linear: bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False))
    with pytest.raises(UnsupportedModelError, match="is a Linear8bitLt whose weight is a Int8Params"):
        Teal(target=0.5).fit(model, calibration)


def test_torchao(llama, calibration):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(llama, torchao.Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedModelError, match="whose weight is a Int8Tensor, not a plain tensor"):
        Teal(target=0.5).fit(llama, calibration)


def test_adapters(calibration):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(UnsupportedModelError, match="Found linear layers named: base_layer, default"):
        Teal(target=0.5).fit(adapted, calibration)
    Teal(target=0.5).fit(adapted.merge_and_unload(), calibration)
