"""One decoded token of a Llama-like model in few launches: dense or sparse linear layers between the same glue.

Layers that read one input lie side by side and take one launch; the cache has a fixed size; positions are tensors. So a
step can be compiled and captured in a CUDA graph, for the dense model as for the sparse one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.errors import SuiteError
from sparsifier import Rule, Site, SparsifierError
from sparsifier.kernels.columns import GatedProduct, Product, cutoff_of, input_major
from sparsifier.kernels.masked import kept_input
from sparsifier.kernels.on_cuda import CudaColumns, CudaRows
from sparsifier.rule import Vector
from sparsifier.sites import ACT, Decoder

GROUPS = {"attention": ("q", "k", "v"), "o": ("o",), "mlp": ("gate", "up"), "down": ("down",)}
"""Layers that read one input."""
PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
Rules = Mapping[Site, Rule]


class Weights:
    """The weights of layers that read one input, side by side, in the usual order and input-major.

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
        """By the library's product."""
        biases: list[Tensor] = [
            b if b is not None else self.usual.new_zeros(n) for b, n in zip(self.biases, self.widths)
        ]
        bias = torch.cat(biases) if any(b is not None for b in self.biases) else None
        return Dense(self.usual, bias)

    def sparse(self, rules: Rules) -> Product:
        """By the kernel, in one launch."""
        own = [rules.get(site, Rule()) for site in self.sites]
        biases = [self._start(i, rule) for i, rule in enumerate(own)]
        filled = [b if b is not None else torch.zeros(n) for b, n in zip(biases, self.widths)]
        bias = torch.cat([b.cpu() for b in filled]) if any(b is not None for b in biases) else None
        return CudaColumns(self.major, list(zip(self.widths, own)), bias)

    def one(self, i: int, rule: Rule) -> Product:
        """One of the layers alone: the kernel, or the library's product where nothing rests."""
        start = self._start(i, rule)
        if rule.masks_nothing and rule.low_rank is None:
            part = self.usual.split(self.widths)[i]
            return Dense(part, None if start is None else start.to(part))
        return CudaColumns(self.major.split(self.widths)[i], [(self.widths[i], rule)], start)

    def rows(self, i: int, act: Rule, rule: Rule) -> GatedProduct:
        """The kernel of a layer whose rows rest under an act mask.

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
    """A linear layer by the library's product."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self._weight, self._bias = weight, bias

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight, self._bias)


class Gated(nn.Module):
    """``act(gate) * up``, the two side by side in one product."""

    def __init__(self, activation: nn.Module, both: Product) -> None:
        super().__init__()
        self.activation, self.both = activation, both

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.both(x).chunk(2, -1)
        return cast(Tensor, self.activation(gate) * up)


class GatedRows(nn.Module):
    """The same under an act mask: rows of ``up`` that rest are not read."""

    def __init__(
        self, activation: nn.Module, gate: Product, rows: GatedProduct, mask: tuple[Vector, Vector] | None
    ) -> None:
        super().__init__()
        self.activation, self.gate, self.rows, self.mask = activation, gate, rows, mask

    def forward(self, x: Tensor) -> Tensor:
        gate = self.activation(self.gate(x))
        return self.rows(x if self.mask is None else kept_input(x, *self.mask), gate)


class Block(nn.Module):
    """A decoder block for one token, with its cache."""

    def __init__(self, layer: Any, products: Mapping[str, Any], length: int) -> None:
        super().__init__()
        attention = layer.self_attn
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        self.q_norm, self.k_norm = (getattr(attention, name, None) for name in ("q_norm", "k_norm"))
        self.qkv, self.o, self.mlp, self.down = (products[name] for name in ("attention", "o", "mlp", "down"))
        self.rotate: Callable[..., tuple[Tensor, Tensor]] = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        self.size, self.scaling = attention.head_dim, attention.scaling
        config = attention.config
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        weight = layer.mlp.down_proj.weight
        shape = 1, self.groups, length, self.size
        self.keys, self.values = (torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in range(2))

    def forward(
        self, x: Tensor, more: Tensor, cos: Tensor, sin: Tensor, at: Tensor, seen: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual stream, and what is to be added to it: a compiler adds it where it is read next."""
        x = x + more
        width = self.groups * self.size
        q, k, v = self.qkv(self.before(x)).split([self.heads * self.size, width, width], -1)
        # Query heads that share a key head are a batch of queries to it.
        q = q.view(1, self.groups, -1, self.size)
        k, v = (t.view(1, self.groups, 1, self.size) for t in (k, v))
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rotate(q, k, cos, sin)
        self.keys.index_copy_(2, at, k)
        self.values.index_copy_(2, at, v)
        x = x + self.o(_attention(q, self.keys, self.values, seen, self.scaling).reshape(1, 1, -1))
        return x, cast(Tensor, self.down(self.mlp(self.between(x))))


def _attention(q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scaling: float) -> Tensor:
    """Attention of one token, in sums that a compiler joins with what is around them: fewer launches, and no set-up.

    `q` [1, groups, heads of a group, size]; `keys`, `values` [1, groups, length, size]; `seen` [1, 1, 1, length].
    """
    scores = (q[:, :, :, None].float() * keys[:, :, None].float()).sum(-1) * scaling
    weights = torch.where(seen, scores, -torch.inf).softmax(-1)
    return (weights[..., None] * values[:, :, None].float()).sum(-2).to(q.dtype)


class Step(nn.Module):
    """A model that decodes one token after another.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of the Llama, Mistral, Qwen2 or Qwen3 family.
    fused : list of dict of str to Weights
        Of every block, by the keys of `GROUPS` (`fuse`).
    length : int
        Of the cache, in tokens.
    rules : dict of Site to Rule, optional
        Of a plan; without it every product is the library's.
    head : callable
        Product of the output layer.
    """

    def __init__(
        self, model: Any, fused: list[dict[str, Weights]], length: int, rules: Rules | None, head: Product
    ) -> None:
        super().__init__()
        decoder = Decoder.of(model)
        trunk: Any = decoder.trunk
        self.embed: Any = trunk.embed_tokens
        self.norm: Any = trunk.norm
        self.rotary: Any = trunk.rotary_emb
        self.head: Any = head
        device = model.get_output_embeddings().weight.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        self.blocks = nn.ModuleList(
            Block(layer, _products(i, layer, of, rules), length)
            for i, (layer, of) in enumerate(zip(decoder.layers, fused))
        )

    def forward(self) -> Tensor:
        """Logits [1, 1, vocabulary] after `token` at position `at`, which moves on by one."""
        x = self.embed(self.token)
        cos, sin = self.rotary(x, self.at[None])
        seen = (self.places <= self.at)[None, None, None]
        more = torch.zeros_like(x)
        for block in self.blocks:
            x, more = block(x, more, cos, sin, self.at, seen)
        logits = self.head(self.norm(x + more))
        self.at += 1
        return logits


def fuse(model: Any) -> list[dict[str, Weights]]:
    """The weights of every block, side by side where one input is read.

    Raises
    ------
    SuiteError
        If the model is not built like Llama.
    """
    decoder = Decoder.of(model)
    for layer in decoder.layers:
        known = {name for name, _ in layer.named_children()}
        if known != set(PARTS) or not hasattr(decoder.trunk, "rotary_emb"):
            raise SuiteError(
                f"{type(model).__name__}: a step is written for blocks of {', '.join(PARTS)} (Llama, Mistral, Qwen2, "
                f"Qwen3), and these have {', '.join(sorted(known))}"
            )
    return [{name: Weights(decoder, block, roles) for name, roles in GROUPS.items()} for block in range(decoder.blocks)]


def _products(block: int, layer: Any, weights: dict[str, Weights], rules: Rules | None) -> dict[str, Any]:
    """What a block computes with, by the keys of `GROUPS`."""
    activation = layer.mlp.act_fn
    if rules is None:
        products = {name: of.dense() for name, of in weights.items()}
    else:
        masked = rules.get(Site(block, ACT))
        products = {name: of.sparse(rules) for name, of in weights.items() if name != "mlp" or masked is None}
        if masked is not None:
            gate, up = (rules.get(Site(block, role), Rule()) for role in ("gate", "up"))
            of = weights["mlp"]
            rows = GatedRows(activation, of.one(0, gate), of.rows(1, masked, up), _mask(up, of.usual))
            return products | {"mlp": rows}
    return products | {"mlp": Gated(activation, products["mlp"])}


def _mask(rule: Rule, like: Tensor) -> tuple[Vector, Vector] | None:
    """Cutoff and shift of a rule, ready for `kept_input`."""
    if rule.masks_nothing:
        return None
    cutoff, shift = cutoff_of(rule, like.dtype), rule.shift
    return (
        cutoff.to(like.device, torch.float32) if isinstance(cutoff, Tensor) else cutoff,
        shift.to(like) if isinstance(shift, Tensor) else shift,
    )
