"""Prepares products of one token by small programs in CUDA C++, whose sums others read or which finish themselves."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from itertools import accumulate

import torch
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.contract import cutoff_of
from resting.sparsifier.decoding.cuda.arguments import ProductArguments
from resting.sparsifier.decoding.cuda.codes import Codes
from resting.sparsifier.decoding.cuda.compiled import function, ready
from resting.sparsifier.decoding.cuda.sums import WORD, Sums, steps_for
from resting.sparsifier.decoding.cuda.taking import AS_IT_IS, Input
from resting.sparsifier.decoding.cuda.typical import typical_sum
from resting.sparsifier.decoding.cuda.variant import COLUMNS, FIXED, STORED, Tile, Variant
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Rule, Vector

BIASES = 1024.0
"""How many times as large as a usual sum biases may be before sums are counted in larger steps."""
VECTOR = 8
"""Numbers in 16 bytes, which a lane reads at once."""
DEFAULT = Tile(8, 16, 8)


class VotingColumns:
    """Computes ``scale (W (x - shift)_kept + U V (x - x_kept) + bias)``, input-major, for several layers in one launch.

    Parameters
    ----------
    weight : Tensor [out, in], or Codes
        A tensor has the strides of an input-major store; of several layers, one after another. On a GPU that `missing`
        says nothing about.
    layers : list of (int, Rule)
        Number of outputs and rule of each, at most three. Low-rank parts take one launch more, all together.
    bias : Tensor [out], optional
    taken : Input
    into : Sums, optional
        What the product is added to, in its steps.
    place : Sums, optional
        Zeros, which the product is added to in steps of its own: `sums` then has both. Where this and `into` are None,
        a call gives the product in the model's dtype.
    scale : float
        What is added is multiplied by it.
    zeros : Sums, optional
        Are made zeros of on the way; nothing that is read or added to here.
    reads_all : bool
        Read all weights, also those of zeros: for layers that mask nothing.
    tile : Tile
    float_sums : bool
        Add in float32, in any order: bits then differ from run to run. Not into `into`.

    Raises
    ------
    SparsifierError
        If the kernel does not take these rules or shapes.
    """

    def __init__(
        self,
        weight: Tensor | Codes,
        layers: list[tuple[int, Rule]],
        bias: Tensor | None = None,
        taken: Input = AS_IT_IS,
        into: Sums | None = None,
        place: Sums | None = None,
        scale: float = 1.0,
        zeros: Sums | None = None,
        reads_all: bool = False,
        tile: Tile = DEFAULT,
        float_sums: bool = False,
        resting: bool = False,
        early: bool = False,
    ) -> None:
        outputs, inputs = weight.shape
        rules, widths, device = [rule for _, rule in layers], [width for width, _ in layers], weight.device
        check_shapes(weight, widths, taken)
        finished = into is None and place is None
        if float_sums and not finished:
            raise SparsifierError("sums that others read are in fixed point")
        codes = weight if isinstance(weight, Codes) else None
        if codes is not None and not codes.fits(tile):
            raise SparsifierError(f"a product of codes of {codes.bits} bits does not fit the layout {tile}")
        width = COLUMNS if codes is None else codes.tile
        self.weight = weight.detach() if isinstance(weight, Tensor) else weight
        self.taken, self.tile, self._device = taken, tile, device
        cutoff = torch.stack([_vector(cutoff_of(rule, weight.dtype), inputs, device) for rule in rules])
        shifted = any(rule.shifts for rule in rules)
        shift = torch.stack([_vector(torch.as_tensor(r.shift).to(weight.dtype), inputs, device) for r in rules])
        start = None if bias is None else _vector(bias, outputs, device)
        self._low_rank = None if resting else _low_rank(weight, layers, taken, tile, early)
        rank = 0 if self._low_rank is None else self._low_rank.highest
        if rank and width != COLUMNS:
            raise SparsifierError(
                f"products of codes with a low-rank part have {COLUMNS} outputs a program, not {width}"
            )
        rows, rank_rows = tile.programs(inputs), tile.programs(rank) if rank else 0
        if into is None:
            usual = typical_sum(weight, rules, taken)
            if (
                start is not None
            ):  # what sums start from may be far larger than what is added, and has a place in 64 bits
                usual = max(usual, float(start.abs().max()) / BIASES)
            steps = 1.0 if float_sums else steps_for(usual, rows + rank_rows)
            into = Sums(outputs, steps, device) if place is None else place.scaled(steps)
        if into.count != outputs:
            raise SparsifierError(f"{outputs} outputs are not added to {into.count} sums")
        self.sums = into
        self.sums.register(rows + rank_rows)
        tiles = [-(-n // width) for n in widths]
        self.grid = sum(tiles), rows + rank_rows
        self._counter = torch.zeros(2 * sum(tiles), dtype=torch.int32, device=device)
        self._kept = cutoff, shift, start, zeros, taken
        self._outputs, self._finished, self._wide, self._scale = outputs, finished, resting, scale
        starts, first_tiles = list(accumulate(widths[:-1])), list(accumulate(tiles[:-1]))
        nowhere = 1 << 30
        self._arguments = ProductArguments(
            weight=weight.data_ptr() if isinstance(weight, Tensor) else weight.words.data_ptr(),
            cutoff=cutoff.data_ptr(),
            shift=shift.data_ptr(),
            y=self.sums.words.data_ptr(),
            counter=self._counter.data_ptr(),
            eps=taken.eps,
            inputs=inputs,
            outputs=outputs,
            stride=weight.stride(1) // VECTOR if isinstance(weight, Tensor) else weight.stride,
            y_width=self.sums.width,
            rows=rows,
            begins=tuple([*starts, outputs, outputs][:2]),
            tiles=tuple([*first_tiles, nowhere, nowhere][:2]),
        )
        a = self._arguments
        if codes is not None:
            a.scales, a.half_scales = codes.scales.data_ptr(), codes.half_scales
        if start is not None:
            a.start = start.data_ptr()
        if taken.gain is not None:
            self._gain = taken.gain.detach().to(device, torch.float32).contiguous()
            a.gain = self._gain.data_ptr()
        if taken.sums is not None:
            a.x, a.x_unit, a.x_width = taken.sums.words.data_ptr(), taken.sums.unit, taken.sums.width
        if zeros is not None:
            a.zero, a.zeros = zeros.words.data_ptr(), zeros.vectors
        if self._low_rank is not None:
            u, ranks = self._low_rank.u, self._low_rank.ranks
            a.u, a.u_stride, a.ranks = u.data_ptr(), u.stride(0) // VECTOR, ranks.data_ptr()
        self.variant = Variant(
            "columns",
            ctypes.sizeof(ProductArguments),
            half=weight.dtype == torch.float16,
            bits=16 if codes is None else codes.bits,
            lane_bytes=16 if codes is None else codes.lane_bytes,
            scales=1 if codes is None else codes.scales.shape[2],
            warps=tile.warps,
            per=tile.inputs,
            loads=tile.loads,
            layers=len(layers),
            source=STORED if taken.sums is None else FIXED,
            input=taken.kind,
            inputs=inputs if taken.gain is not None else 0,
            activation=taken.gated,
            rounds_first=taken.rounds_first,
            shifted=shifted,
            reads_all=reads_all,
            resting=resting,
            ranked=self._low_rank is not None,
            started=start is not None,
            float_sums=float_sums,
            finished=finished,
            wide_out=resting,
            chained=cuda_overlap.chained(device),
            early=early,
        )
        self._function = function(self.variant, device)
        ready(device)

    def __call__(self, x: Tensor | None = None) -> Tensor | None:
        """Computes the product [..., out] of `x` [..., in], or adds it to the sums and gives None."""
        a = self._arguments
        if x is not None:
            a.x = x.data_ptr()
        if self._low_rank is not None:
            z = self._low_rank(x)
            a.z = z.data_ptr()
        y = None
        if self._finished:
            dtype = torch.float32 if self._wide else self.weight.dtype
            y = torch.empty(self._outputs, dtype=dtype, device=self._device)
            a.out = y.data_ptr()
        a.steps, a.y_unit, a.limit = self.sums.steps * self._scale, self.sums.unit, self.sums.limit
        with cuda_overlap.on(self._device):
            self._function(self.grid, a)
        return y


class _LowRank:
    """Computes ``V (x - x_kept)`` of layers side by side in float32, and holds their U."""

    def __init__(
        self, weight: Tensor | Codes, layers: list[tuple[int, Rule]], taken: Input, tile: Tile, early: bool
    ) -> None:
        inputs, device, dtype = weight.shape[1], weight.device, weight.dtype
        factors = [rule.low_rank for _, rule in layers]
        ranks = [0 if f is None else f[0].shape[1] for f in factors]
        places = [-(-rank // WORD) * WORD for rank in ranks]
        begins = [0, *accumulate(places)]
        self.highest = max(ranks)
        v = torch.zeros(inputs, begins[-1], dtype=dtype, device=device)
        outputs = sum(width for width, _ in layers)
        self.u = torch.zeros(self.highest, outputs, dtype=dtype, device=device)
        at = 0
        for (width, _), begin, rank, parts in zip(layers, begins, ranks, factors):
            if parts is not None:
                self.u[:rank, at : at + width] = parts[0].detach().t()
                v[:, begin : begin + rank] = parts[1].detach().t()
            at += width
        self.ranks = torch.tensor(list(zip(begins, ranks)), dtype=torch.int32, device=device)
        masks = [(place, replace(rule, low_rank=None)) for place, (_, rule) in zip(places, layers) if place]
        self._first = VotingColumns(v.t(), masks, taken=taken, tile=tile, resting=True, early=early)

    def __call__(self, x: Tensor | None) -> Tensor:
        z = self._first(x)
        assert z is not None
        return z


def _low_rank(
    weight: Tensor | Codes, layers: list[tuple[int, Rule]], taken: Input, tile: Tile, early: bool
) -> _LowRank | None:
    has = any(rule.low_rank is not None and rule.low_rank[0].shape[1] for _, rule in layers)
    return _LowRank(weight, layers, taken, tile, early) if has else None


def check_shapes(weight: Tensor | Codes, widths: list[int], taken: Input) -> None:
    """Refuses what the kernel does not take.

    Raises
    ------
    SparsifierError
        With the reason, as one sentence.
    """
    if weight.dtype not in (torch.bfloat16, torch.float16):
        raise SparsifierError(f"compiled kernels take bfloat16 and float16, not {str(weight.dtype)[6:]}")
    if taken.gain is not None and taken.gated:
        raise SparsifierError("a launch takes a norm or a gate")
    check_widths(weight.shape[1], widths, taken.gain is not None)
    if isinstance(weight, Codes):
        return
    if weight.shape[0] > 1 and weight.stride(0) != 1:
        raise SparsifierError("column kernels take input-major weights: see `input_major`")
    if weight.stride(1) % VECTOR or weight.data_ptr() % 16:
        raise SparsifierError("compiled kernels take rows that begin at multiples of 16 bytes")


def check_widths(inputs: int, widths: list[int], is_normed: bool) -> None:
    """Refuses widths that the kernel does not take, of layers side by side.

    Raises
    ------
    SparsifierError
        With the reason, as one sentence.
    """
    if not 1 <= len(widths) <= 3:
        raise SparsifierError(f"one to three layers share a launch, not {len(widths)}")
    if sum(widths) % VECTOR:
        raise SparsifierError(f"compiled kernels take outputs in multiples of {VECTOR}, not {sum(widths)}")
    if any(width % WORD for width in widths[:-1]):
        raise SparsifierError(f"layers that share a compiled launch have multiples of {WORD} outputs, not {widths}")
    if is_normed and inputs % 16:
        raise SparsifierError(f"compiled kernels take the norm of multiples of 16 inputs, not of {inputs}")


def _vector(value: Vector, width: int, device: torch.device) -> Tensor:
    return torch.as_tensor(value).detach().to(device, torch.float32).expand(width).contiguous()
