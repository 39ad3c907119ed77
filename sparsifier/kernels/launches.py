"""How a product is laid out on a GPU: measured once a shape, half of its inputs at rest, if a model knows no better."""

from __future__ import annotations

from functools import cache, partial

import torch

from sparsifier.errors import SparsifierError
from sparsifier.kernels import cuda, cuda_rows
from sparsifier.kernels.cuda import Launch
from sparsifier.kernels.timing import COLD, seconds

TILES = [(16, 512, 4), (8, 1024, 4), (64, 128, 4), (64, 64, 4), (128, 64, 4), (256, 32, 4)]
"""Inputs, outputs and warps of a program's tile."""
RESIDENT = (2, 3, 4, 6, 8, 12, 16)
"""Programs a multiprocessor: the split is such that all of them have nearly the same."""
FINAL = 5
"""Layouts that are kept, fastest first: which is fastest beside other products is for a model to find out."""
THIN = 512
"""Products of fewer outputs are not worth a trial."""
ROW_TILES = [(512, 8, 4), (1024, 4, 4), (1024, 8, 8), (2048, 4, 8), (2048, 8, 8)]
"""Inputs, outputs and warps of the kernel that skips rows."""
CHOSEN: dict[str, Launch] = {}
"""What is used from now on, by shape."""
SMALLEST = Launch(16, 16, 4, 2)
"""For layers narrower than any tile, and in the interpreter."""


def candidates(inputs: int, outputs: int, processors: int, widths: tuple[int, ...] = ()) -> list[Launch]:
    """Layouts worth a trial for a product of this shape.

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


def columns_launch(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...] = ()
) -> Launch:
    """The layout of `cuda.columns` for this shape on this GPU: the one preferred, else the one that is fastest alone.

    Raises
    ------
    SparsifierError
        If no tile divides `widths`.
    """
    if device.type != "cuda":  # the interpreter
        return _smallest(widths)
    name = _name(inputs, outputs, dtype, device, widths)
    if name not in CHOSEN:
        CHOSEN[name] = finalists(inputs, outputs, dtype, device, widths)[0]
    return CHOSEN[name]


def prefer(
    launch: Launch,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    device: torch.device,
    widths: tuple[int, ...] = (),
) -> None:
    """Have `columns_launch` answer with this one from now on."""
    CHOSEN[_name(inputs, outputs, dtype, device, widths)] = launch


def _name(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...]) -> str:
    return f"columns {inputs}x{outputs} {dtype} on {device}, whole tiles at {sorted(set(widths))}"


def rows_launch(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Launch:
    """The fastest layout of `cuda_rows.gated_rows` for this shape on this GPU."""
    if device.type != "cuda":
        return SMALLEST._replace(split=1)
    return CHOSEN.setdefault(
        f"rows {inputs}x{outputs} {dtype} on {device}", _fastest_rows(inputs, outputs, dtype, device)
    )


def _smallest(widths: tuple[int, ...]) -> Launch:
    if any(width % SMALLEST.outputs for width in widths):
        raise SparsifierError(f"layers of {list(widths)} outputs share no launch: not multiples of {SMALLEST.outputs}")
    return SMALLEST


@cache
def finalists(
    inputs: int, outputs: int, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...]
) -> list[Launch]:
    """The fastest layouts for this shape where one product follows another of its kind, best first."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    choices = candidates(inputs, outputs, processors, widths)
    if choices and outputs < THIN:
        return [max((at for at in choices if at.outputs == choices[-1].outputs), key=lambda at: at.split)]
    if not choices:
        return [_smallest(widths)]
    weights = _weights(inputs, outputs, dtype, device)
    x = torch.randn(1, inputs, dtype=dtype, device=device)
    cutoff = x.abs().float().median().expand(1, inputs).contiguous()

    def time(at: Launch) -> float:
        tiles = -(-outputs // at.outputs)
        counter = torch.zeros(tiles, dtype=torch.int32, device=device)
        none = None, None, None, None, None, 0.0, False, None
        more = cutoff, None, None, [outputs, outputs], *none, counter, False, list(at), False, False
        return seconds([partial(cuda.columns, x, w, *more) for w in weights], device)

    return sorted(choices, key=time)[:FINAL]


@cache
def _fastest_rows(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> Launch:
    weights = [w.view(outputs, inputs) for w in _weights(inputs, outputs, dtype, device)]
    x, gate = (torch.randn(1, n, dtype=dtype, device=device) for n in (inputs, outputs))
    cutoff = gate.abs().float().median().expand(outputs).contiguous()

    def time(at: Launch) -> float:
        more = gate, cutoff, None, None, None, 0.0, False, list(at)
        return seconds([partial(cuda_rows.gated_rows, x, w, *more) for w in weights], device)

    return min((Launch(k, n, warps, 1) for k, n, warps in ROW_TILES), key=time)


def _weights(inputs: int, outputs: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    count = max(2, min(256, COLD["cuda"] // (inputs * outputs * dtype.itemsize)))
    return list(torch.randn(count, inputs, outputs, dtype=dtype, device=device))
