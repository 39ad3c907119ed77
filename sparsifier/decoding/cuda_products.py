"""Prepares products of one token on a GPU, once for a layer or for layers that read the same input."""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn

from resting.sparsifier.decoding.contract import cutoff_of
from resting.sparsifier.decoding.cuda_forms import USUAL, form_for
from resting.sparsifier.decoding.cuda_layouts import Shape, chosen
from resting.sparsifier.decoding.cuda_masked import Masked, one_each
from resting.sparsifier.decoding.cuda_triton import Launch
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Rule, Vector

WHOLE = 64
"""Ranks are filled up with zeros to multiples of it, so that layers side by side have whole tiles."""


class InputNorm(NamedTuple):
    """Describes the RMSNorm of an input, done in the launch of the product that reads it."""

    squares: Tensor
    """float32 [n]: add up to the input's sum of squares."""
    gain: Tensor
    """[in]: read before earlier launches are waited for, so that nothing under way may write it."""
    eps: float
    rounds_first: bool = True
    """Whether the input is rounded before it is multiplied by the gain."""


NO_NORM = None, None, 0.0, True
"""What a launch is told where its input has no norm."""


class CudaColumns(nn.Module):
    """Computes ``W (x - shift)_kept + U V (x - x_kept) + bias``, input-major, for several layers in one launch.

    Parameters
    ----------
    weight : Tensor [out, in]
        With the strides of an input-major store, or of a part of one; of several layers, one after another.
    layers : list of (int, Rule)
        Number of outputs and rule of each; all but the last have a multiple of a tile's outputs. Their low-rank parts
        take one launch more, all together.
    bias : Tensor [out], optional
    launch : Launch or Masked, optional
        A list of what is active and programs that share it, or small programs with masked loads; the fastest for this
        shape where None.
    reads_all : bool
        Read all weights, those of zeros too, which else rest: for layers that mask nothing and whose inputs are no
        zeros. What is read needs no list then.
    rests : float
        Share of the inputs that is expected to rest, for which the form is chosen.

    Raises
    ------
    SparsifierError
        If layers with these rules cannot share a launch, or one masks anything although all inputs are to be read.
    """

    def __init__(
        self,
        weight: Tensor,
        layers: list[tuple[int, Rule]],
        bias: Tensor | None = None,
        launch: Launch | Masked | None = None,
        reads_all: bool = False,
        rests: float = USUAL,
    ) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        device, rules = weight.device, [rule for _, rule in layers]
        widths = [width for width, _ in layers]
        if not 1 <= len(rules) <= 3:
            raise SparsifierError(f"one to three layers share a launch, not {len(rules)}")
        if reads_all and not all(rule.masks_nothing for rule in rules):
            raise SparsifierError("a layer with a mask does not read every input")
        kernel = "dense" if reads_all else "columns"
        self.shape = Shape(kernel, inputs, outputs, weight.dtype, device, tuple(widths[:-1]))
        self.launch = launch or form_for(self.shape, 0.0 if reads_all else rests)
        if outputs > 1 and weight.stride(0) != 1:
            raise SparsifierError("column kernels take input-major weights: see `input_major`")
        if any(width % self.launch.outputs for width in widths[:-1]):
            raise SparsifierError(f"layers of {widths} outputs do not share tiles of {self.launch.outputs}")
        self._inputs = inputs
        self._weight = weight.detach().t()
        self._cutoff = torch.stack([_vector(cutoff_of(r, weight.dtype), inputs, device) for r in rules])
        shifted = any(r.shifts for r in rules)
        shifts = [_vector(torch.as_tensor(r.shift).to(weight.dtype), inputs, device) for r in rules]
        self._shift = torch.stack(shifts) if shifted else None
        self._reads_all = reads_all
        self._start = None if bias is None else _vector(bias, outputs, device)
        self._begins = [*accumulate(widths[:-1]), outputs, outputs][:2]
        self._counter = torch.zeros(-(-outputs // self.launch.outputs), dtype=torch.int32, device=device)
        self._sums = None  # what atomic operations add to
        if isinstance(self.launch, Masked) and self.launch.atomic:
            self._sums = torch.zeros(1, outputs, dtype=torch.float32, device=device)
        self._least = one_each(self._cutoff)
        self._low_rank = None
        if any(rule.low_rank is not None and rule.low_rank[0].shape[1] for rule in rules):
            self._low_rank = LowRank(layers, self._cutoff, weight.dtype)
        _ready(device)

    def forward(self, x: Tensor) -> Tensor:
        """Computes the product [..., out] with `x` [..., in] of one token."""
        return self.fused(x)[0]

    def fused(
        self,
        x: Tensor,
        norm: InputNorm | None = None,
        gated: int = 0,
        residual: Tensor | None = None,
        scale: float = 1.0,
        keep_partial_sums: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Computes the product, with what a model does before it and after it, in one launch.

        Parameters
        ----------
        x : Tensor [..., in]
            Of one token.
        norm : InputNorm, optional
            The input is `x` after it.
        gated : int
            `x` is [..., 2 in], a gate and what it opens: the input is this activation of the one
            (`cuda_norm.ACTIVATIONS`, from 1), times the other.
        residual, scale : Tensor [..., out], float, optional
            The product, times `scale`, is added to it.
        keep_partial_sums : bool
            Leave it to who reads the product to add up the sums of the programs that share it, in float32.

        Returns
        -------
        Tensor [..., out], or float32 Tensor [n, out] if `keep_partial_sums`
        float32 Tensor [n]
            With a residual: the sum's squares, for the `InputNorm` of what reads it next.

        Raises
        ------
        SparsifierError
            If `x` or the residual is not one token, or for what a launch does not do together.
        """
        if x.numel() != self._inputs * (2 if gated else 1):
            raise SparsifierError(f"decode kernels take one token of {self._inputs} inputs, not {list(x.shape)}")
        if (gated and norm is not None) or (keep_partial_sums and residual is not None):
            raise SparsifierError("a launch takes a norm or a gate, and adds a residual or keeps its partial sums")
        if residual is not None and residual.numel() != self._weight.shape[1]:
            raise SparsifierError(f"a residual has {self._weight.shape[1]} numbers here, not {list(residual.shape)}")
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        before = *(norm or NO_NORM), gated
        more = (None, None, None) if self._low_rank is None else self._low_rank(x, before)
        y: tuple[Tensor, Tensor]
        if isinstance(self.launch, Masked):
            y = torch.ops.resting.masked_columns(
                *(x, self._weight, self._least, self._shift, self._start, self._begins, *more, *before),
                *(residual, scale, self._sums, 1, self._reads_all, list(self.launch), keep_partial_sums),
            )
            return y
        y = torch.ops.resting.columns(
            *(x, self._weight, self._cutoff, self._shift, self._start, self._begins, *more, *before, residual, scale),
            *(self._counter, self._reads_all, False, list(self.launch), False, keep_partial_sums),
        )
        return y


class LowRank(nn.Module):
    """Computes ``V (x - x_kept)``, the first half of what layers add for resting inputs, and holds U for the second.

    Their V lie side by side, each in whole tiles, and so do their U, of which a program reads its layer's rank only.
    """

    def __init__(self, layers: list[tuple[int, Rule]], cutoff: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        inputs, device = cutoff.shape[1], cutoff.device
        empty = {width: (torch.empty(width, 0), torch.empty(0, inputs)) for width, _ in layers}
        factors = [rule.low_rank or empty[width] for width, rule in layers]
        ranks = [u.shape[1] for u, _ in factors]
        with_part = [i for i, rank in enumerate(ranks) if rank]
        places = [-(-rank // WHOLE) * WHOLE for rank in ranks]
        begins = [0, *accumulate(places)]
        v = torch.zeros(inputs, begins[-1], dtype=dtype, device=device)
        u = torch.zeros(max(ranks), sum(width for width, _ in layers), dtype=dtype, device=device)
        at = 0
        for (width, _), begin, rank, (left, right) in zip(layers, begins, ranks, factors):
            v[:, begin : begin + rank] = right.detach().t()
            u[:rank, at : at + width] = left.detach().t()
            at += width
        self._v, self._u, self._cutoff = v, u, cutoff[with_part].contiguous()
        self._begins = [*(begins[i] for i in with_part[1:]), begins[-1], begins[-1]][:2]
        self._ranks = torch.tensor(list(zip(begins, ranks)), dtype=torch.int32, device=device)
        self._parts = list(zip(begins, ranks, (width for width, _ in layers)))
        widths = tuple(places[i] for i in with_part[:-1])
        self.shape = Shape("columns", inputs, begins[-1], dtype, device, widths)
        self.launch = chosen(self.shape)
        self._counter = torch.zeros(-(-begins[-1] // self.launch.outputs), dtype=torch.int32, device=device)

    def forward(
        self, x: Tensor, before: tuple[Tensor | None, Tensor | None, float, bool, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        z, _ = torch.ops.resting.columns(
            *(x, self._v, self._cutoff, None, None, self._begins, None, None, None, *before, None, 1.0),
            *(self._counter, False, True, list(self.launch), True, False),
        )
        return z, self._u, self._ranks

    def whole(self, x: Tensor, before: tuple[Tensor | None, Tensor | None, float, bool, int]) -> Tensor:
        """Computes ``U V (x - x_kept)`` of all layers [out], in float32, where another kernel adds it."""
        z, _, _ = self(x, before)
        y = torch.zeros(self._u.shape[1], dtype=torch.float32, device=x.device)
        at = 0
        for begin, rank, width in self._parts:
            if rank:
                y[at : at + width] = z.flatten()[begin : begin + rank] @ self._u[:rank, at : at + width].float()
            at += width
        return y


class CudaRows(nn.Module):
    """Computes the rows of ``up`` where the activated gate does not rest, times that gate.

    Parameters
    ----------
    weight : Tensor [rows, in]
        Output-major, as linear layers have it.
    cutoff : float or Tensor [rows]
    bias : Tensor [rows], optional
    launch : Launch, optional
    """

    def __init__(
        self, weight: Tensor, cutoff: Vector, bias: Tensor | None = None, launch: Launch | None = None
    ) -> None:
        super().__init__()
        outputs, self._inputs = weight.shape
        self.shape = Shape("rows", self._inputs, outputs, weight.dtype, weight.device)
        self.launch = launch or chosen(self.shape)
        self._weight = weight.detach().contiguous()
        self._cutoff = _vector(cutoff, outputs, weight.device)
        self._start = None if bias is None else _vector(bias, outputs, weight.device)
        _ready(weight.device)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Computes ``gate * (W x + bias)`` where ``|gate|`` exceeds the cutoff, else 0; `gate` is [..., rows]."""
        return self.fused(x, gate)

    def fused(self, x: Tensor, gate: Tensor, norm: InputNorm | None = None, activation: int = 0) -> Tensor:
        """Computes what `forward` does with the `norm` of `x` and an `activation` of the gate, in one launch."""
        if x.numel() != self._inputs:
            raise SparsifierError(f"decode kernels take one token of {self._inputs} inputs, not {list(x.shape)}")
        y: Tensor = torch.ops.resting.gated_rows(
            *(x.contiguous(), self._weight, gate.contiguous(), self._cutoff, self._start),
            *(norm or NO_NORM),
            *(activation, list(self.launch)),
        )
        return y


def _ready(device: torch.device) -> None:
    """Waits until what a layer consists of is there: its launches, which begin early, do not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _vector(value: Vector, width: int, device: torch.device) -> Tensor:
    return torch.as_tensor(value).detach().to(device, torch.float32).expand(width).contiguous()
