"""A decoder block for one token, by kernels whose launches hold norms, the activated gate and the residual stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.contract import cutoff_of, weight_of
from resting.sparsifier.decoding.cuda_forms import USUAL
from resting.sparsifier.decoding.cuda_layouts import SMALLEST
from resting.sparsifier.decoding.cuda_norm import ACTIVATIONS
from resting.sparsifier.decoding.cuda_products import CudaColumns, CudaRows, InputNorm
from resting.sparsifier.decoding.cuda_quantised import QuantisedColumns, QuantisedRows
from resting.sparsifier.decoding.step.cuda_attention import attend
from resting.sparsifier.decoding.step.cuda_sum import normed_sum
from resting.sparsifier.decoding.step.form import AttentionForm, BlockForm, Norm
from resting.sparsifier.decoding.step.running import UnknownFormError
from resting.sparsifier.decoding.step.side_by_side import SideBySide
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.masking import kept_input
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.roles import ACT
from resting.sparsifier.rule import Rule, Vector
from resting.sparsifier.sites import Site

Rules = Mapping[Site, Rule]
NOWHERE = 1 << 30
"""A window that no token leaves."""


def gain_of(norm: Norm) -> Tensor:
    """Gives what a kernel multiplies by: the weight, with its offset in float32."""
    weight = norm.weight
    return weight if norm.rounds_first else (weight.float() + norm.offset).contiguous()


class Side(NamedTuple):
    """Describes layers side by side, as a launch takes them."""

    weight: Tensor
    layers: list[tuple[int, Rule]]
    bias: Tensor | None
    reads_all: bool


class Products:
    """Makes the products of one block's layers, whose weights are laid out for them in place of their usual order.

    Parameters
    ----------
    decoder : Decoder
    block : int
    rules : dict of Site to Rule
    rests : float
        Share of the inputs that is expected to rest.
    codes : dict of Site to QuantisedWeight, optional
        What is read in place of the layers' weights, which then stay as they lie.
    """

    def __init__(
        self,
        decoder: Decoder,
        block: int,
        rules: Rules,
        rests: float = USUAL,
        codes: Mapping[Site, QuantisedWeight] | None = None,
    ) -> None:
        self._decoder, self._block, self._rules, self._rests = decoder, block, rules, rests
        self.codes = codes
        self.laid_out: list[SideBySide] = []

    def rule(self, role: str) -> Rule:
        return self._rules.get(Site(self._block, role), Rule())

    @property
    def act(self) -> Rule | None:
        """Gives the mask of the activated gate."""
        return self._rules.get(Site(self._block, ACT))

    def weight(self, role: str) -> Tensor:
        """Gives the weights that a sparse token reads: the layer's own, or those of its rule."""
        return weight_of(self._decoder.projection(Site(self._block, role)), self.rule(role))

    def start(self, role: str) -> Tensor | None:
        """Adds a layer's own bias and its rule's."""
        own: Tensor | None = self._decoder.linear(Site(self._block, role)).bias
        parts = [b.detach().float().cpu() for b in (own, self.rule(role).bias) if b is not None]
        return sum(parts[1:], parts[0]) if parts else None

    def widths(self, *roles: str) -> list[int]:
        """Gives the numbers of outputs of layers."""
        return [self._decoder.linear(Site(self._block, role)).out_features for role in roles]

    def reads_all(self, *roles: str) -> bool:
        """Tells whether all weights of layers are read: nothing is masked, and their input has no zeros."""
        has_zeros = "down" in roles and self.act is not None
        rules = [self.rule(role) for role in roles]
        return not has_zeros and all(rule.masks_nothing and rule.low_rank is None for rule in rules)

    def columns(self, *roles: str) -> CudaColumns | QuantisedColumns:
        """Makes the product of layers that read one input, in one launch."""
        if self.codes is not None:
            codes = self.held(*roles)
            rules = [self.rule(role) for role in roles]
            dtype, bias, reads_all = self.weight(roles[0]).dtype, self.together(*roles), self.reads_all(*roles)
            return QuantisedColumns(codes, rules, dtype, bias, reads_all=reads_all)
        widths = self.widths(*roles)
        if any(width % SMALLEST.outputs for width in widths[:-1]):
            raise UnknownFormError(
                f"layers of {widths} outputs share no launch: all but the last must be multiples of {SMALLEST.outputs}"
            )
        side = self.side_by_side(*roles)
        return CudaColumns(side.weight, side.layers, side.bias, reads_all=side.reads_all, rests=self._rests)

    def side_by_side(self, *roles: str) -> Side:
        """Lays out layers that read one input for one launch."""
        linears = [self._decoder.linear(Site(self._block, role)) for role in roles]
        laid_out = SideBySide(linears, [self.weight(role) for role in roles])
        self.laid_out.append(laid_out)
        rules = [self.rule(role) for role in roles]
        return Side(laid_out.weight, list(zip(laid_out.widths, rules)), self.together(*roles), self.reads_all(*roles))

    def held(self, *roles: str) -> list[QuantisedWeight]:
        """Gives the codes of layers, on their device."""
        assert self.codes is not None
        return [self._held(self.codes, role) for role in roles]

    def _held(self, codes: Mapping[Site, QuantisedWeight], role: str) -> QuantisedWeight:
        """Gives the codes of a layer on its device; they may have been found on another."""
        found, device = codes[Site(self._block, role)], self.weight(role).device
        zeros = None if found.zeros is None else found.zeros.to(device)
        return replace(found, codes=found.codes.to(device), scales=found.scales.to(device), zeros=zeros)

    def together(self, *roles: str) -> Tensor | None:
        """Gives what the sums of layers start from, one after another."""
        starts = [self.start(role) for role in roles]
        filled = [b if b is not None else torch.zeros(n) for b, n in zip(starts, self.widths(*roles))]
        return torch.cat(filled) if any(b is not None for b in starts) else None

    def rows(self, role: str, act: Rule) -> CudaRows | QuantisedRows:
        """Makes the product of a layer whose rows rest under an act mask; its weights stay as they are."""
        if self.rule(role).low_rank is not None:
            raise SparsifierError(f"a low-rank part at {role}, whose rows rest under an act mask, has no decode kernel")
        weight = self.weight(role)
        if self.codes is not None:
            codes = self._held(self.codes, role)
            return QuantisedRows(codes, cutoff_of(act, weight.dtype), weight.dtype, self.start(role))
        return CudaRows(weight, cutoff_of(act, weight.dtype), self.start(role))


class Attention(nn.Module):
    """Attends with one token to what a store holds."""

    def __init__(self, form: AttentionForm, device: torch.device) -> None:
        super().__init__()
        norm = form.q_norm
        self.q_gain = None if form.q_norm is None else gain_of(form.q_norm)
        self.k_gain = None if form.k_norm is None else gain_of(form.k_norm)
        self.eps, self.rounds_first = (0.0, True) if norm is None else (norm.eps, norm.rounds_first)
        self.numbers = form.norm_of_all, form.rotary, form.window or NOWHERE, form.scaling, form.softcap
        self.counter = torch.zeros(form.heads, dtype=torch.int32, device=device)

    def forward(
        self, qkv: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, at: Tensor, unit: float = 0.0
    ) -> Tensor:
        y: Tensor = attend(
            *(qkv, keys, values, cos, sin, at, self.counter, self.q_gain, self.k_gain, self.eps, self.rounds_first),
            *(*self.numbers, unit),
        )
        return y


class CudaBlock(nn.Module):
    """Computes a block for one token.

    Parameters
    ----------
    form : BlockForm
    products : Products
    roles : tuple of str
        Of the block's matrices.

    Raises
    ------
    SparsifierError
        If a rule has no kernel.
    UnknownFormError
        If an act mask meets a gate and up in one matrix.
    """

    def __init__(self, form: BlockForm, products: Products, roles: tuple[str, ...]) -> None:
        super().__init__()
        self.form = form
        self.qkv = products.columns("qkv") if "qkv" in roles else products.columns("q", "k", "v")
        self.attention = Attention(form.attention, self.qkv.shape.device)
        self.o, self.mlp = products.columns("o"), _mlp(form, products, roles)
        self.down = products.columns("down")
        self._gains = {name: gain_of(norm) for name, norm in _norms(form).items()}

    def forward(
        self, x: Tensor, squares: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, at: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Gives the residual stream [1, 1, width], and sums of its squares.

        Parameters
        ----------
        x, squares : Tensor [1, 1, width], float32 Tensor [n]
            The stream before the block, and what adds up to its sum of squares.
        keys, values : Tensor [groups, length, size]
        cos, sin : Tensor [length, rotary]
        at : int64 Tensor [1]
        """
        qkv, _ = self.qkv.fused(x, self._norm("before_attention", squares), keep_partial_sums=True)
        y = self.attention(qkv, keys, values, cos, sin, at)
        x, squares = self._added(self.o, "after_attention", x, y, 0)
        opened = self.mlp(x, self._norm("before_mlp", squares))
        return self._added(self.down, "after_mlp", x, opened, self.mlp.gated)

    def _norm(self, name: str, squares: Tensor) -> InputNorm | None:
        norm: Norm | None = getattr(self.form, name)
        return None if norm is None else InputNorm(squares, self._gains[name], norm.eps, norm.rounds_first)

    def _added(
        self, product: CudaColumns | QuantisedColumns, norm_name: str, x: Tensor, y: Tensor, gated: int
    ) -> tuple[Tensor, Tensor]:
        norm: Norm | None = getattr(self.form, norm_name)
        if norm is None:
            return product.fused(y, gated=gated, residual=x, scale=self.form.residual)
        z, _ = product.fused(y, gated=gated)
        total: tuple[Tensor, Tensor] = normed_sum(
            x, z, self._gains[norm_name], norm.eps, norm.rounds_first, self.form.residual
        )
        return total


class Gated(nn.Module):
    """Computes gate and up in one launch; the next opens the one by the other."""

    def __init__(self, both: CudaColumns | QuantisedColumns, activation: int) -> None:
        super().__init__()
        self.both, self.gated = both, activation

    def forward(self, x: Tensor, norm: InputNorm | None) -> Tensor:
        return self.both.fused(x, norm)[0]


class GatedRows(nn.Module):
    """Computes gate and up under an act mask: rows of ``up`` that rest are not read."""

    gated = 0

    def __init__(
        self,
        gate: CudaColumns | QuantisedColumns,
        rows: CudaRows | QuantisedRows,
        activation: int,
        mask: tuple[Vector, Vector] | None,
    ) -> None:
        super().__init__()
        self.gate, self.rows, self.activation, self.mask = gate, rows, activation, mask

    def forward(self, x: Tensor, norm: InputNorm | None) -> Tensor:
        gate, _ = self.gate.fused(x, norm)
        if self.mask is None:
            return self.rows.fused(x, gate, norm, self.activation)
        if norm is not None:
            x = _normed(x, norm)
        return self.rows.fused(kept_input(x, *self.mask), gate, None, self.activation)


def _normed(x: Tensor, norm: InputNorm) -> Tensor:
    v = x.float() * torch.rsqrt(norm.squares.sum() / x.shape[-1] + norm.eps)
    return v.to(x) * norm.gain if norm.rounds_first else (v * norm.gain).to(x)


def _mlp(form: BlockForm, products: Products, roles: tuple[str, ...]) -> Gated | GatedRows:
    activation = ACTIVATIONS.index(form.activation) + 1
    act = products.act
    if act is None:
        both = products.columns("gate_up") if "gate_up" in roles else products.columns("gate", "up")
        return Gated(both, activation)
    if "gate_up" in roles:
        raise UnknownFormError("the plan masks the activated gate, and gate and up are one matrix")
    rule = products.rule("up")
    rows = products.rows("up", act)
    return GatedRows(products.columns("gate"), rows, activation, _mask(rule, rows))


def _mask(rule: Rule, rows: CudaRows | QuantisedRows) -> tuple[Vector, Vector] | None:
    """Makes cutoff and shift of a rule ready for `kept_input`."""
    if rule.masks_nothing:
        return None
    shape = rows.shape
    cutoff, shift = cutoff_of(rule, shape.dtype), rule.shift
    return (
        cutoff.to(shape.device, torch.float32) if isinstance(cutoff, Tensor) else cutoff,
        shift.to(shape.device, shape.dtype) if isinstance(shift, Tensor) else shift,
    )


def _norms(form: BlockForm) -> dict[str, Norm]:
    names = ("before_attention", "after_attention", "before_mlp", "after_mlp")
    return {name: norm for name in names if (norm := getattr(form, name)) is not None}
