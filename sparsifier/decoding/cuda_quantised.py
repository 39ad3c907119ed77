"""Prepares products of one token with quantised weights on a GPU, as `cuda_products` does for weights as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from math import gcd

import torch
from torch import Tensor, nn

from resting.sparsifier.decoding import cuda_quantised_triton as in_triton
from resting.sparsifier.decoding.contract import cutoff_of
from resting.sparsifier.decoding.cuda import quantised as by_tensor_cores
from resting.sparsifier.decoding.cuda.compiled import function
from resting.sparsifier.decoding.cuda.quantised import LAUNCHES, MIXED, Launch, QuantisedArguments, QuantisedVariant
from resting.sparsifier.decoding.cuda_layouts import Shape
from resting.sparsifier.decoding.cuda_products import NO_NORM, InputNorm, LowRank
from resting.sparsifier.decoding.cuda_quantised_layout import Packed, by_outputs, in_fragments, in_planes
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.timing import seconds_per_call
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.rule import Rule, Vector

TRIAL_BYTES = 1 << 29
"""Bytes of codes that are walked through where layouts are tried."""
TRITON = (16, 4, 8)
"""Inputs of a step, warps, and programs that share a tile, of the form in Triton."""
TRITON_ROWS = (4, 8, 4)
"""Blocks of 32 words of a step, outputs of a program, and warps."""
NOWHERE = 1 << 30
"""A tile that is not there."""


class QuantisedColumns(nn.Module):
    """Computes what `CudaColumns` does, with weights of 4 or 8 bits, for several layers in one launch.

    Products and sums are in float32, of numbers that are exactly `QuantisedWeight.dequantised`, and in one order.
    An infinite input gives NaN.

    Parameters
    ----------
    weights : list of QuantisedWeight
        Of each layer, one format.
    rules : list of Rule
        Of each.
    dtype : torch.dtype
        Of the input and of the result: bfloat16 or float16.
    bias : Tensor [out], optional
    launch : Launch, optional
        The fastest for this shape where None.
    reads_all : bool
        Read all weights: for layers that mask nothing and whose inputs are no zeros.
    triton : bool, optional
        Use the form in Triton; None where the compiled one is missing.

    Raises
    ------
    SparsifierError
        If a format has no kernel, or layers with these weights or rules cannot share a launch.
    """

    def __init__(
        self,
        weights: list[QuantisedWeight],
        rules: list[Rule],
        dtype: torch.dtype,
        bias: Tensor | None = None,
        launch: Launch | None = None,
        reads_all: bool = False,
        triton: bool | None = None,
    ) -> None:
        super().__init__()
        widths, device = [weight.outputs for weight in weights], weights[0].codes.device
        inputs, outputs = weights[0].inputs, sum(widths)
        self._triton = by_tensor_cores.missing(device) is not None if triton is None else triton
        _check(weights, rules, reads_all)
        if not self._triton and dtype not in (torch.bfloat16, torch.float16):
            raise SparsifierError(
                f"compiled kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
            )
        packed = [(in_planes if self._triton else in_fragments)(weight) for weight in weights]
        tile = packed[0].tile
        halves = [p.scales.dtype == torch.float16 for p in packed]
        self._halves = MIXED if len({*halves}) > 1 else int(halves[0]), sum(half << i for i, half in enumerate(halves))
        scales = torch.cat([p.scales if self._triton else p.scales.view(torch.int16) for p in packed], 1)
        self._packed = Packed(torch.cat([p.codes for p in packed], 1), scales, packed[0].bits, packed[0].unit)
        self._inputs, self._outputs, self._dtype = inputs, outputs, dtype
        name = f"{weights[0].format.name}{' dense' if reads_all else ''}"
        self.shape = Shape(name, inputs, outputs, dtype, device, tuple(widths[:-1]))
        self._cutoff = torch.stack([_vector(cutoff_of(rule, dtype), inputs, device) for rule in rules])
        shifted = any(rule.shifts for rule in rules)
        shifts = [_vector(torch.as_tensor(rule.shift).to(dtype), inputs, device) for rule in rules]
        self._shift = torch.stack(shifts) if shifted else None
        self._start = None if bias is None else _vector(bias, outputs, device)
        begins = [*accumulate(widths[:-1]), outputs, outputs]
        tiles = [*accumulate(p.codes.shape[1] // in_triton.WORDS for p in packed[:-1]), NOWHERE, NOWHERE]
        self._begins, self._first_tiles = (begins[0], begins[1]), (tiles[0], tiles[1])
        self._layers, self._reads_all = len(rules), reads_all
        self._counter = torch.zeros(self._tiles, dtype=torch.int32, device=device)
        self._low_rank = None
        if any(rule.low_rank is not None and rule.low_rank[0].shape[1] for rule in rules):
            self._low_rank = LowRank(list(zip(widths, rules)), self._cutoff, dtype)
        self.launch = launch or (LAUNCHES[0] if self._triton else self._chosen())
        if not self._triton and not self.launch.fits(inputs, tile):
            raise SparsifierError(f"a product of {inputs} inputs does not fit the layout {self.launch}")
        if device.type == "cuda":  # launches begin early, and do not wait for what a layer consists of
            torch.cuda.synchronize(device)

    @property
    def how(self) -> str:
        """Says by what kernel it is computed."""
        return "Triton" if self._triton else "tensor cores"

    @property
    def _tiles(self) -> int:
        return self._packed.codes.shape[1] // in_triton.WORDS

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
        """Computes the product with what a model does before it and after it: as `CudaColumns.fused`.

        Partial sums are one row here, in float32.

        Raises
        ------
        SparsifierError
            If `x` or the residual is not one token, or for what a launch does not do together.
        """
        if x.numel() != self._inputs * (2 if gated else 1) or x.dtype != self._dtype:
            raise _not_a_token(x, self._inputs, self._dtype)
        if (gated and norm is not None) or (keep_partial_sums and residual is not None):
            raise SparsifierError("a launch takes a norm or a gate, and adds a residual or keeps its partial sums")
        if residual is not None and residual.numel() != self._outputs:
            raise SparsifierError(f"a residual has {self._outputs} numbers here, not {list(residual.shape)}")
        x, residual = x.contiguous(), None if residual is None else residual.contiguous()
        shape = (1, self._outputs) if keep_partial_sums else (*x.shape[:-1], self._outputs)
        y = torch.empty(shape, dtype=torch.float32 if keep_partial_sums else x.dtype, device=x.device)
        programs = 1 if self._triton else self.launch.programs
        y_squares = torch.empty(0 if residual is None else self._tiles * programs, device=x.device)
        more = None if self._low_rank is None else self._low_rank.whole(x, (*(norm or NO_NORM), gated))
        if self._triton:
            start = self._start if more is None else more if self._start is None else self._start + more
            squares, gain, eps, rounds_first = norm or NO_NORM
            in_triton.quantised_columns(
                x,
                self._packed.codes,
                self._packed.scales,
                self._packed.bits,
                self._outputs,
                self._cutoff,
                self._shift,
                start,
                self._begins,
                self._first_tiles,
                squares,
                gain,
                eps,
                rounds_first,
                gated,
                residual,
                scale,
                self._counter,
                self._reads_all,
                TRITON,
                y,
                y_squares,
            )
        else:
            self._run(self.launch, self._packed.codes, x, norm, gated, residual, scale, more, y, y_squares)
        return y, y_squares

    def _run(
        self,
        launch: Launch,
        codes: Tensor,
        x: Tensor,
        norm: InputNorm | None,
        gated: int,
        residual: Tensor | None,
        scale: float,
        more: Tensor | None,
        y: Tensor,
        y_squares: Tensor,
    ) -> None:
        squares, gain, eps, rounds_first = norm or NO_NORM
        variant = QuantisedVariant(
            self._packed.bits,
            self._packed.tile // self._packed.unit,
            launch.warps,
            launch.programs,
            launch.loads,
            launch.inputs(self._inputs),
            half=x.dtype == torch.float16,
            half_scales=self._halves[0],
            layers=self._layers,
            reads_all=self._reads_all,
            shifted=self._shift is not None,
            normed=norm is not None,
            gain_float=gain is not None and gain.dtype == torch.float32,
            rounds_first=rounds_first,
            activation=gated,
            started=self._start is not None,
            more=more is not None,
            added=residual is not None,
            wide=y.dtype == torch.float32,
        )
        tensors = (
            *(x, codes, self._packed.scales, self._cutoff, self._shift, gain, self._start, more),
            *(squares, residual, y, y_squares),
        )
        arguments = QuantisedArguments(
            *(None if t is None else t.data_ptr() for t in tensors),
            *(eps, scale, self._inputs, self._outputs, self._tiles, 0 if squares is None else squares.numel()),
            self._begins,
            self._first_tiles,
            self._halves[1],
        )
        function(variant, x.device)((self._tiles, launch.programs), arguments)

    def _chosen(self) -> Launch:
        fitting = [launch for launch in LAUNCHES if launch.fits(self._inputs, self._packed.tile)]
        if not fitting:
            raise SparsifierError(f"a product of {self._inputs} inputs has no layout in a GPU's shared memory")
        what = str(self.shape._replace(device=torch.device("cuda")))
        best = remembered("layout", what, self.shape.device, lambda: min(fitting, key=self._timed()))
        return Launch(*best)

    def _timed(self) -> Callable[[Launch], float]:
        """Prepares the timing of layouts, in seconds, half of the inputs at rest, this matrix several times."""
        device, codes = self.shape.device, self._packed.codes
        count = max(1, min(256, -(-TRIAL_BYTES // (codes.numel() * 4))))
        copies = [codes, *(codes.clone() for _ in range(count - 1))]
        x = torch.randn(1, self._inputs, dtype=self._dtype, device=device)
        y, none = torch.empty(1, self._outputs, dtype=self._dtype, device=device), torch.empty(0, device=device)
        own = self._cutoff
        half = x.abs().float().median().expand(own.shape).contiguous()

        def time(launch: Launch) -> float:
            self._cutoff = half
            calls = [partial(self._run, launch, c, x, None, 0, None, 1.0, None, y, none) for c in copies]
            try:
                return seconds_per_call(calls, device)
            finally:
                self._cutoff = own

        return time


class QuantisedRows(nn.Module):
    """Computes what `CudaRows` does, with weights of 4 or 8 bits: rows of ``up`` whose activated gate does not rest.

    Parameters
    ----------
    weight : QuantisedWeight
    cutoff : float or Tensor [rows]
    dtype : torch.dtype
        Of the input, the gate and the result.
    bias : Tensor [rows], optional

    Raises
    ------
    SparsifierError
        If the format has no kernel.
    """

    def __init__(self, weight: QuantisedWeight, cutoff: Vector, dtype: torch.dtype, bias: Tensor | None = None) -> None:
        super().__init__()
        self._codes, self._scales = by_outputs(weight)
        self._inputs, outputs, device = weight.inputs, weight.outputs, weight.codes.device
        self._format = weight.format
        self.shape = Shape(f"{weight.format.name} rows", self._inputs, outputs, dtype, device)
        self._cutoff = _vector(cutoff, outputs, device)
        self._start = None if bias is None else _vector(bias, outputs, device)
        blocks, rows, warps = TRITON_ROWS
        self._launch = blocks, gcd(rows, weight.format.group), warps
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """Computes ``gate * (W x + bias)`` where ``|gate|`` exceeds the cutoff, else 0; `gate` is [..., rows]."""
        return self.fused(x, gate)

    def fused(self, x: Tensor, gate: Tensor, norm: InputNorm | None = None, activation: int = 0) -> Tensor:
        """Computes what `forward` does with the `norm` of `x` and an `activation` of the gate, in one launch."""
        if x.numel() != self._inputs or x.dtype != self.shape.dtype:
            raise _not_a_token(x, self._inputs, self.shape.dtype)
        gate = gate.contiguous()
        y = torch.empty_like(gate)
        in_triton.quantised_rows(
            *(x.contiguous(), self._codes, self._scales, self._format.bits, self._format.group),
            *(gate, self._cutoff, self._start, *(norm or NO_NORM), activation, self._launch, y),
        )
        return y


def _check(weights: list[QuantisedWeight], rules: list[Rule], reads_all: bool) -> None:
    if not 1 <= len(rules) == len(weights) <= 3:
        raise SparsifierError(f"one to three layers share a launch, not {len(weights)}")
    if reads_all and not all(rule.masks_nothing for rule in rules):
        raise SparsifierError("a layer with a mask does not read every input")
    if any(rule.weight is not None for rule in rules):
        raise SparsifierError("a rule with weights of its own has no product of quantised weights")
    names = sorted({weight.format.name for weight in weights})
    if len(names) > 1 or len({weight.inputs for weight in weights}) > 1:
        raise SparsifierError(f"layers of the formats {', '.join(names)} share no launch, or their inputs differ")


def _not_a_token(x: Tensor, inputs: int, dtype: torch.dtype) -> SparsifierError:
    wanted, found = (str(d).removeprefix("torch.") for d in (dtype, x.dtype))
    return SparsifierError(
        f"decode kernels take one token of {inputs} inputs in {wanted}, not {list(x.shape)} in {found}"
    )


def _vector(value: Vector, width: int, device: torch.device) -> Tensor:
    return torch.as_tensor(value).detach().to(device, torch.float32).expand(width).contiguous()
