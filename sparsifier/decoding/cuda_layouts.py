"""Chooses how a product is laid out on a GPU, measured once per shape with half of the inputs at rest."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from resting.sparsifier.decoding import cuda_triton, cuda_triton_rows
from resting.sparsifier.decoding.cuda_triton import Launch
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.timing import seconds_per_call
from resting.sparsifier.errors import SparsifierError

TILES = [(64, 128, 2), (16, 1024, 4)]
"""Inputs, outputs and warps of a program's tile, as they are tried: few, since each is compiled, and those that were
fastest for some matrix of an 8B model among many more."""
RESIDENT = (4, 8)
"""Programs per multiprocessor: the split is such that all of them have nearly the same."""
NARROW = 512
"""Products of fewer outputs are not worth a trial."""
TRIAL_BYTES = 1 << 28
"""Bytes of weights that are walked through: several times what a cache holds, and little of a GPU's memory."""
ROW_TILES = [(512, 8, 4), (1024, 4, 4), (1024, 8, 8), (2048, 4, 8), (2048, 8, 8)]
"""Inputs, outputs and warps of a tile of the kernel that skips rows, as they are tried."""
CHOSEN: dict[str, Any] = {}
"""Holds the layouts that are used from now on, by shape."""
SMALLEST = Launch(16, 16, 4, 2)
"""Is used for layers narrower than any tile, and in the interpreter."""


class Shape(NamedTuple):
    """Describes a product that a layout is chosen for."""

    kernel: str
    """Which kernel runs: ``columns`` (`cuda_triton.columns`), ``dense`` (that kernel without a mask) or ``rows``
    (`cuda_triton_rows.gated_rows`)."""
    inputs: int
    outputs: int
    dtype: torch.dtype
    device: torch.device
    widths: tuple[int, ...] = ()
    """Outputs that must be whole tiles: those of layers which others follow in the same launch."""

    def __str__(self) -> str:
        tiles = f", whole tiles at {sorted(set(self.widths))}" if self.widths else ""
        return f"{self.kernel} {self.inputs}x{self.outputs} {self.dtype} on {self.device}{tiles}"


def candidates(inputs: int, outputs: int, processors: int, widths: tuple[int, ...] = ()) -> list[Launch]:
    """Lists the layouts worth a trial for a product of this shape.

    Parameters
    ----------
    inputs, outputs : int
    processors : int
        Multiprocessors of the GPU.
    widths : tuple of int
        Outputs that must be whole tiles: those of layers which others follow in the same launch.
    """
    found = []
    for k, n, warps in TILES:
        if any(width % n for width in widths):
            continue
        tiles = -(-outputs // n)
        most = max(1, min(32, inputs // k))
        splits = {min(most, max(1, resident * processors // tiles)) for resident in RESIDENT}
        found += [Launch(k, n, warps, split) for split in sorted(splits)]
    return found


def chosen(shape: Shape) -> Launch:
    """Gives the layout for this shape: the one that was fastest when it was measured.

    Raises
    ------
    SparsifierError
        If no tile divides the shape's widths.
    """
    if shape.device.type != "cuda":  # the interpreter
        return _smallest(shape)
    if str(shape) not in CHOSEN:
        anywhere = str(shape._replace(device=torch.device("cuda")))
        CHOSEN[str(shape)] = Launch(*remembered("layout", anywhere, shape.device, lambda: fastest(shape)))
    launch: Launch = CHOSEN[str(shape)]
    return launch


def fastest(shape: Shape) -> Launch:
    """Finds the fastest layout for this shape where one product follows another of its kind."""
    if shape.kernel == "rows":
        return min((Launch(k, n, warps, 1) for k, n, warps in ROW_TILES), key=_rows_timed(shape))
    processors = torch.cuda.get_device_properties(shape.device).multi_processor_count
    choices = candidates(shape.inputs, shape.outputs, processors, shape.widths)
    if choices and shape.outputs < NARROW:
        narrow = min(at.outputs for at in choices)
        return max((at for at in choices if at.outputs == narrow), key=lambda at: at.split)
    if not choices:
        return _smallest(shape)
    return min(choices, key=_columns_timed(shape))


def _smallest(shape: Shape) -> Launch:
    if any(width % SMALLEST.outputs for width in shape.widths):
        raise SparsifierError(
            f"layers of {list(shape.widths)} outputs share no launch: not multiples of {SMALLEST.outputs}"
        )
    return SMALLEST._replace(split=1) if shape.kernel == "rows" else SMALLEST


def _columns_timed(shape: Shape) -> Callable[[Launch], float]:
    """Prepares the timing of layouts of `cuda_triton.columns`, in seconds, half of the inputs at rest."""
    device, weights = shape.device, weights_of(shape)
    x = torch.randn(1, shape.inputs, dtype=shape.dtype, device=device)
    cutoff = x.abs().float().median().expand(1, shape.inputs).contiguous()
    outputs = weights[0].shape[1]
    begins = [outputs, outputs]

    def time(at: Launch) -> float:
        counter = torch.zeros(-(-outputs // at.outputs), dtype=torch.int32, device=device)
        none = None, None, None, None, None, 0.0, True, 0, None, 1.0
        more = cutoff, None, None, begins, *none, counter, shape.kernel == "dense", False, list(at), False, False
        return seconds_per_call([partial(cuda_triton.columns, x, w, *more) for w in weights], device)

    return time


def _rows_timed(shape: Shape) -> Callable[[Launch], float]:
    """Prepares the timing of layouts of `cuda_triton_rows.gated_rows`, in seconds, half of the rows at rest."""
    device, weights = shape.device, [w.view(-1, shape.inputs) for w in weights_of(shape)]
    x, gate = (torch.randn(1, n, dtype=shape.dtype, device=device) for n in (shape.inputs, len(weights[0])))
    cutoff = gate.abs().float().median().expand(len(weights[0])).contiguous()

    def time(at: Launch) -> float:
        more = gate, cutoff, None, None, None, 0.0, True, 0, list(at)
        return seconds_per_call([partial(cuda_triton_rows.gated_rows, x, w, *more) for w in weights], device)

    return time


def weights_of(shape: Shape) -> list[torch.Tensor]:
    """Makes weights of this shape, or of as many of its outputs as `TRIAL_BYTES` have room for."""
    row = shape.inputs * shape.dtype.itemsize
    outputs = min(shape.outputs, max(1024, TRIAL_BYTES // row // 1024 * 1024))
    count = max(1, min(256, TRIAL_BYTES // (row * outputs)))
    return list(torch.randn(count, shape.inputs, outputs, dtype=shape.dtype, device=shape.device))
