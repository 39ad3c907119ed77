"""Sets text, speed and bytes of the sparse model beside those of the dense one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from resting.benchmarks.latency.decode import Decode, weight_bytes
from resting.benchmarks.using.generating import COLD, Written
from resting.sparsifier import Meter, Plan

METERED = 64
"""Decoded tokens whose bytes are measured, through the definition: their mean moves little after that."""


@dataclass(frozen=True)
class Bytes:
    """Counts the bytes of weights that a decode step reads.

    Attributes
    ----------
    dense : int
        Of the dense model: blocks, output layer and norms.
    blocks : int
        Of them, the blocks' matrices.
    sparsity : float, optional
        The share of `blocks` left unread, as measured on decoded tokens; None where nothing was decoded.
    """

    dense: int
    blocks: int
    sparsity: float | None

    @property
    def sparse(self) -> float | None:
        """Bytes that the sparse model reads, what the plan adds included."""
        return None if self.sparsity is None else self.dense - self.sparsity * self.blocks


def measured(model: Any, plan: Plan, written: Written) -> Bytes:
    """Measure the bytes of the decode steps that wrote a text: the prompt goes first, and is not counted."""
    blocks, rest = weight_bytes(model)
    steps = min(METERED, written.new - 1)
    if steps < 1:
        return Bytes(blocks + rest, blocks, None)
    meter = Meter()
    with torch.inference_mode():
        with plan.applied(model):
            decode = Decode(model, written.ids, written.prompt)
        with plan.applied(model, meter=meter):
            for _ in range(steps):
                decode.step()
    return Bytes(blocks + rest, blocks, meter.byte_sparsity() if meter.tokens else 0.0)


def lines(dense: Written, sparse: Written, read: Bytes) -> list[str]:
    """Make the table of both, and what it comes to in a sentence or two."""
    rows = [_row("dense", dense, read.dense), _row("sparse", sparse, read.sparse)]
    heads = ["", "tokens a second", "ms a token", "MB of weights a token"]
    found = tabulate(rows, heads, disable_numparse=True, colalign=("left", *("right",) * 3)).splitlines()
    parts = []
    if dense.per_token is not None and sparse.per_token is not None:
        ratio = dense.per_token / sparse.per_token
        parts.append(f"the sparse model is {ratio:.2f} times as fast as the dense one in plain transformers")
    if read.sparse is not None:
        parts.append(
            f"it reads {read.sparse / read.dense:.2f} of the bytes: {read.sparsity:.3f} of those of the blocks were "
            "left unread"
        )
    said = "; ".join(parts)
    few = [name for name, of in (("dense", dense), ("sparse", sparse)) if of.per_token is None]
    notes = [f"{said[:1].upper()}{said[1:]}."] if said else []
    if few:
        notes.append(f"Not timed: {' and '.join(few)}, with fewer than {COLD + 2} tokens.")
    notes.append(_same(dense, sparse))
    return [*found, "", *notes]


def _row(name: str, written: Written, read: float | None) -> list[str]:
    seconds = written.per_token
    times = ["-", "-"] if seconds is None else [f"{1 / seconds:.1f}", f"{1e3 * seconds:.2f}"]
    return [name, *times, "-" if read is None else f"{read / 1e6:.1f}"]


def _same(dense: Written, sparse: Written) -> str:
    """How far the two texts are the same."""
    a, b = (of.ids[0, of.prompt :] for of in (dense, sparse))
    shared = common(a, b)
    if shared == len(a) == len(b):
        return f"Both wrote the same {shared} tokens."
    return f"Both begin with the same {shared} tokens, of {len(a)} and {len(b)}."


def common(a: Tensor, b: Tensor) -> int:
    """Count the tokens at the beginning that are the same."""
    size = min(len(a), len(b))
    return int((a[:size] == b[:size]).long().cumprod(0).sum())
