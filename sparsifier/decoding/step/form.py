"""Describes what a decoder block computes as data: norms, heads, rotary embedding, gate and residual stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
}
"""What opens a gate."""
Table = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Gives cosines and sines [n, rotary] of the rotary embedding of positions [n]."""


@dataclass(frozen=True, eq=False)
class Norm:
    """Describes an RMSNorm.

    Attributes
    ----------
    module : nn.Module
        Holds the weight [n].
    eps : float
    offset : float
        Added to the weight: 1 in Gemma.
    rounds_first : bool
        The normed input is rounded to the model's dtype, and then multiplied by the weight.
    """

    module: nn.Module
    eps: float
    offset: float = 0.0
    rounds_first: bool = True

    @property
    def weight(self) -> Tensor:
        """Gives the weight [n] as the module holds it now."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the norm of `x` [..., n], in its dtype."""
        v = x.float()
        v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + self.eps)
        if self.rounds_first:
            return self.weight.to(x) * v.to(x.dtype)
        return (v * (self.offset + self.weight.float())).to(x.dtype)


@dataclass(frozen=True, eq=False)
class AttentionForm:
    """Describes grouped attention.

    Attributes
    ----------
    heads, groups, size : int
        Query heads, heads of keys and values, and numbers in a head.
    scaling : float
    rotary : int
        Leading numbers of a head that are turned; 0 for none.
    table : str
        Names the rotary table in `ModelForm.tables`.
    window : int, optional
        Tokens that a token sees, itself among them.
    softcap : float
        Scores are bounded by it, smoothly; 0 for not at all.
    q_norm, k_norm : Norm, optional
        Of every head, or over all of them together if `norm_of_all`.
    norm_of_all : bool
    """

    heads: int
    groups: int
    size: int
    scaling: float
    rotary: int
    table: str
    window: int | None = None
    softcap: float = 0.0
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    norm_of_all: bool = False


@dataclass(frozen=True, eq=False)
class BlockForm:
    """Describes a block: attention, then a gated MLP, each added to the residual stream.

    Attributes
    ----------
    attention : AttentionForm
    activation : str
        One of `ACTIVATIONS`.
    before_attention, after_attention, before_mlp, after_mlp : Norm, optional
        Of what goes into a part, and of what comes out of it before it is added.
    residual : float
        What comes out of a part is multiplied by it before it is added.
    """

    attention: AttentionForm
    activation: str
    before_attention: Norm | None
    after_attention: Norm | None
    before_mlp: Norm | None
    after_mlp: Norm | None
    residual: float = 1.0


@dataclass(frozen=True, eq=False)
class ModelForm:
    """Describes a decoder of such blocks.

    Attributes
    ----------
    blocks : list of BlockForm
    tables : dict of str to callable
        Of the rotary embeddings.
    norm : Norm
        After the last block.
    logits_divisor : float
        The output layer's result is divided by it (Granite).
    logits_softcap : float
        Bounds the logits, smoothly; 0 for not at all.
    embedding_scale : float
        What the embedding of a token is multiplied by before the first block.
    """

    blocks: list[BlockForm]
    tables: dict[str, Table]
    norm: Norm
    logits_divisor: float = 1.0
    logits_softcap: float = 0.0
    embedding_scale: float = 1.0

    def finished(self, logits: Tensor) -> Tensor:
        """Computes what is left to do after the output layer."""
        if self.logits_divisor != 1.0:
            logits = logits / self.logits_divisor
        if self.logits_softcap:
            logits = torch.tanh(logits / self.logits_softcap) * self.logits_softcap
        return logits
