"""The weights of a model's blocks, laid out for decoding: those of layers that read one input lie side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resting.benchmarks.errors import SuiteError
from resting.sparsifier import Rule, Site, SparsifierError
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.contract import Product, cutoff_of, input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns, CudaRows
from resting.sparsifier.roles import ACT

GROUPS = {"attention": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}
"""Layers that read one input."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Whose blocks are built alike, and whose rotary embedding turns the halves of a head."""
Rules = Mapping[Site, Rule]


class Weights:
    """Lays the weights of layers that read one input side by side, in the usual order and input-major.

    The model's own layers become views of the first: there is one copy of each order.
    """

    def __init__(self, decoder: Decoder, block: int, roles: tuple[str, ...]) -> None:
        self.sites = [Site(block, role) for role in roles]
        linears = [decoder.linear(site) for site in self.sites]
        self.widths = [linear.out_features for linear in linears]
        weights: list[Tensor] = [linear.weight for linear in linears]
        self.usual = torch.cat(weights).detach()
        for linear, part in zip(linears, self.usual.split(self.widths)):
            linear.weight.data = part
        self.major = input_major(self.usual)
        self.biases = [linear.bias for linear in linears]

    def dense(self) -> Product:
        """Make the library's product of them all."""
        biases: list[Tensor] = [
            b if b is not None else self.usual.new_zeros(n) for b, n in zip(self.biases, self.widths)
        ]
        bias = torch.cat(biases) if any(b is not None for b in self.biases) else None
        return Dense(self.usual, bias)

    def sparse(self, rules: Rules) -> CudaColumns:
        """Make the kernel of them all, in one launch."""
        own = [rules.get(site, Rule()) for site in self.sites]
        biases = [self._start(i, rule) for i, rule in enumerate(own)]
        filled = [b if b is not None else torch.zeros(n) for b, n in zip(biases, self.widths)]
        bias = torch.cat([b.cpu() for b in filled]) if any(b is not None for b in biases) else None
        return CudaColumns(self.major, list(zip(self.widths, own)), bias, reads_all=self._reads_all(rules))

    def _reads_all(self, rules: Rules) -> bool:
        """Tell whether no input rests: no layer has a mask, and none reads the zeros that an act mask leaves."""
        zeros = any(site.role == "down" and Site(site.block, ACT) in rules for site in self.sites)
        return not zeros and all(rules.get(site, Rule()).masks_nothing for site in self.sites)

    def one(self, i: int, rule: Rule) -> CudaColumns:
        """Make the kernel of one of the layers alone."""
        part, start = self.major.split(self.widths)[i], self._start(i, rule)
        return CudaColumns(part, [(self.widths[i], rule)], start, reads_all=rule.masks_nothing)

    def rows(self, i: int, act: Rule, rule: Rule) -> CudaRows:
        """Make the kernel of a layer whose rows rest under an act mask.

        Raises
        ------
        SparsifierError
            If the layer has a low-rank part as well.
        """
        if rule.low_rank is not None:
            raise SparsifierError("a low-rank part at up, whose rows rest under an act mask, has no decode kernel")
        part = self.usual.split(self.widths)[i]
        return CudaRows(part, cutoff_of(act, part.dtype), self._start(i, rule))

    def _start(self, i: int, rule: Rule) -> Tensor | None:
        parts = [b.detach().float().cpu() for b in (self.biases[i], rule.bias) if b is not None]
        return sum(parts[1:], parts[0]) if parts else None


class Dense(nn.Module):
    """Computes a linear layer by the library's product."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


def fuse(model: Any) -> list[dict[str, Weights]]:
    """Lay out the weights of every block, side by side where one input is read.

    Raises
    ------
    SuiteError
        If the model is of another family.
    """
    decoder = Decoder.of(model)
    if model.config.model_type not in FAMILIES:
        raise SuiteError(
            f"{type(model).__name__}: a step is written for {', '.join(FAMILIES)}, not for {model.config.model_type}"
        )
    return [{name: Weights(decoder, block, roles) for name, roles in GROUPS.items()} for block in range(decoder.blocks)]
