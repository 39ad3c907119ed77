"""A decoder block for one token, in two forms: by the library's products, and by kernels that do what is between them.

Both take and give the residual stream, and with it what is still to be added to it, or the sums of its squares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency.gpu.attention import attend
from resting.benchmarks.latency.gpu.weights import Rules, Weights
from resting.sparsifier import Rule, Site, SparsifierError
from resting.sparsifier.decoding.contract import cutoff_of
from resting.sparsifier.decoding.cuda_products import CudaColumns, CudaRows, Norm
from resting.sparsifier.masking import kept_input
from resting.sparsifier.roles import ACT
from resting.sparsifier.rule import Vector


class Attention(nn.Module):
    """Attends with one token to a cache of fixed size."""

    def __init__(self, attention: Any, length: int) -> None:
        super().__init__()
        size, groups = attention.head_dim, attention.config.num_key_value_heads
        if size & (size - 1):
            raise SuiteError(f"a step is written for heads of 2^n numbers, and these have {size}")
        window = getattr(attention.config, "sliding_window", None)
        if window is not None and window < length:
            raise SuiteError(f"a step attends to all tokens before one: {length} are more than a window of {window}")
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        self.q_gain, self.k_gain = (None if norm is None else norm.weight.detach() for norm in norms)
        self.eps = 0.0 if norms[0] is None else norms[0].variance_epsilon
        self.scaling = attention.scaling
        like = attention.o_proj.weight
        self.keys, self.values = (like.new_zeros(groups, length, size) for _ in range(2))

    def forward(self, qkv: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> Tensor:
        return attend(qkv, self.keys, self.values, cos, sin, at, self.q_gain, self.k_gain, self.scaling, self.eps)


class Block(nn.Module):
    """Computes a block by the library's products, with what a compiler makes of the rest."""

    def __init__(self, layer: Any, weights: dict[str, Weights], length: int) -> None:
        super().__init__()
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.qkv, self.o, self.both, self.down = (weights[name].dense() for name in ("attention", "o", "mlp", "down"))
        self.attention, self.activation = Attention(layer.self_attn, length), layer.mlp.act_fn

    def forward(self, x: Tensor, more: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Give the residual stream, and what is to be added to it: a compiler adds it where it is read next."""
        x = x + more
        x = x + self.o(self.attention(self.qkv(self.before(x))[0], cos, sin, at))
        gate, up = self.both(self.between(x)).chunk(2, -1)
        return x, self.down(self.activation(gate) * up)


class KernelBlock(nn.Module):
    """Computes a block by kernels whose launches hold RMSNorm, the activated gate and the residual stream as well."""

    def __init__(self, layer: Any, block: int, weights: dict[str, Weights], rules: Rules, length: int) -> None:
        super().__init__()
        if layer.self_attn.config.hidden_act != "silu":
            raise SparsifierError(f"kernels open a gate by silu, not by {layer.self_attn.config.hidden_act}")
        self.gains = [n.weight.detach() for n in (layer.input_layernorm, layer.post_attention_layernorm)]
        self.eps = layer.input_layernorm.variance_epsilon
        self.qkv, self.o, self.down = (weights[name].sparse(rules) for name in ("attention", "o", "down"))
        self.attention, self.mlp = Attention(layer.self_attn, length), _mlp(block, weights["mlp"], rules)

    def forward(self, x: Tensor, squares: Tensor, cos: Tensor, sin: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Give the residual stream, and sums of its squares."""
        before, between = self.gains
        qkv, _ = self.qkv.fused(x, Norm(squares, before, self.eps), keep_partial_sums=True)
        x, squares = self.o.fused(self.attention(qkv, cos, sin, at), residual=x)
        opened = self.mlp(x, Norm(squares, between, self.eps))
        return self.down.fused(opened, gated=self.mlp.gated, residual=x)


class Gated(nn.Module):
    """Computes gate and up in one launch; the next opens the one by the other."""

    gated = True

    def __init__(self, both: CudaColumns) -> None:
        super().__init__()
        self.both = both

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        return self.both.fused(x, norm)[0]


class GatedRows(nn.Module):
    """Computes gate and up under an act mask: rows of ``up`` that rest are not read."""

    gated = False

    def __init__(self, gate: CudaColumns, rows: CudaRows, mask: tuple[Vector, Vector] | None) -> None:
        super().__init__()
        self.gate, self.rows, self.mask = gate, rows, mask

    def forward(self, x: Tensor, norm: Norm) -> Tensor:
        gate, _ = self.gate.fused(x, norm)
        if self.mask is None:
            return self.rows.fused(x, gate, norm)
        rate = torch.rsqrt(norm.squares.sum() / x.shape[-1] + norm.eps)
        return self.rows.fused(kept_input((x.float() * rate).to(x) * norm.gain, *self.mask), gate)


def _mlp(block: int, weights: Weights, rules: Rules) -> Gated | GatedRows:
    act = rules.get(Site(block, ACT))
    if act is None:
        return Gated(weights.sparse(rules))
    gate, up = (rules.get(Site(block, role), Rule()) for role in ("gate", "up"))
    return GatedRows(weights.one(0, gate), weights.rows(1, act, up), _mask(up, weights.usual))


def _mask(rule: Rule, like: Tensor) -> tuple[Vector, Vector] | None:
    """Make cutoff and shift of a rule ready for `kept_input`."""
    if rule.masks_nothing:
        return None
    cutoff, shift = cutoff_of(rule, like.dtype), rule.shift
    return (
        cutoff.to(like.device, torch.float32) if isinstance(cutoff, Tensor) else cutoff,
        shift.to(like) if isinstance(shift, Tensor) else shift,
    )
