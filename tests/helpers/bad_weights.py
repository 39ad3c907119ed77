"""Models with one layer whose weights are not what they look like."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrize

from resting.sparsifier import Decoder, Site


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
