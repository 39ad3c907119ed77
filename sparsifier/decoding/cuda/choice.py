"""Chooses between compiled kernels and those in Triton, and the tiles of the former, by times of single launches."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resting.sparsifier.decoding import cuda_layouts
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda.products import VotingColumns
from resting.sparsifier.decoding.cuda.stream import Stream
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.decoding.cuda.variant import GATED, NORMED, PLAIN, Tile
from resting.sparsifier.decoding.cuda_products import CudaColumns, InputNorm
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.timing import seconds_per_call
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Rule

TILES = [Tile(4, 16, 8), Tile(8, 16, 8), Tile(16, 16, 8), Tile(4, 32, 8), Tile(8, 32, 8), Tile(8, 8, 8), Tile(16, 8, 8)]
"""What is tried."""
SHARES = (0.25, 0.5, 0.7, 0.9)
"""Shares of inputs at rest that tiles are chosen for: the nearest counts."""
SINGLE = GATED + 1
"""Is a plain product that gives numbers in the model's dtype: no other launch adds or reads its sums."""
KINDS = {PLAIN: "plain", NORMED: "normed", GATED: "gated", SINGLE: "single"}
Launch = tuple[int, int, int, bool]
"""What a launch does with its input, its inputs and outputs, and whether any input rests."""
SILU = 1


class Form(NamedTuple):
    """Says which form of a block was faster, and the tiles of the compiled one."""

    tiles: dict[Launch, Tile]
    compiled: float
    """Seconds of its launches in CUDA C++."""
    triton: float

    @property
    def wins(self) -> bool:
        """Tells whether the compiled form was faster."""
        return self.compiled < self.triton

    def tile(self, kind: int, inputs: int, outputs: int, rests: bool) -> Tile:
        """Gives the tile of one of its launches."""
        return self.tiles[kind, inputs, outputs, rests]


CHOSEN: dict[str, tuple[list[Any], float, float]] = {}
"""Holds what is used from now on, by launch: the tile, its seconds and those in Triton."""
FORMS: Counter[str] = Counter()
"""Counts the blocks and single products that were made, by form, with the reason where they are not compiled."""
COMPILED = "compiled"


def in_triton(reason: str) -> str:
    """Names the form in Triton, with the reason for it."""
    return f"Triton: {reason}"


SLOWER = "it was measured to be faster"
SLOWER_AS_A_STEP = "the whole step was measured to be faster"


def chosen_form(launches: list[Launch], like: Tensor, rests: float) -> Form:
    """Chooses the form of a block by the sums of its launches' times, each measured once.

    Parameters
    ----------
    launches : list of Launch
    like : Tensor
        Has the dtype and the device.
    rests : float
        Share of inputs at rest.
    """
    share = min(SHARES, key=lambda known: abs(known - rests))
    tiles, compiled, triton = {}, 0.0, 0.0
    for launch in launches:
        tile, ours, theirs = fastest(launch, like, share if launch[3] else 0.0)
        tiles[launch] = Tile(*tile)
        compiled, triton = compiled + ours, triton + theirs
    return Form(tiles, compiled, triton)


def fastest(launch: Launch, like: Tensor, share: float) -> tuple[list[int], float, float]:
    """Gives the fastest tile for a launch, its seconds, and those of the same product in Triton."""
    kind, inputs, outputs, _ = launch
    what = f"{KINDS[kind]} {inputs}x{outputs} {like.dtype}, {share:g} at rest"
    if what not in CHOSEN:
        found = remembered("tile", what, like.device, lambda: Trial(launch, like, share).fastest())
        CHOSEN[what] = found[0], found[1], found[2]
    return CHOSEN[what]


class Trial:
    """Times launches of one kind on random weights, many times as many as a cache holds."""

    def __init__(self, launch: Launch, like: Tensor, share: float) -> None:
        self.kind, inputs, outputs, _ = launch
        self.dtype, self.device, self.share = like.dtype, like.device, share
        row = inputs * like.element_size()
        self.outputs = min(
            outputs, max(1024, cuda_layouts.TRIAL_BYTES // row // 1024 * 1024)
        )  # of an output layer a part
        self.make_weights(inputs, self.outputs)
        self.x = torch.randn(2 * inputs if self.kind == GATED else inputs, dtype=like.dtype, device=like.device)
        self.gain = torch.ones(inputs, dtype=like.dtype, device=like.device)
        v = self.x.float()
        if self.kind == GATED:
            v = torch.nn.functional.silu(v[:inputs]) * v[inputs:]
        cutoff = float(v.abs().quantile(share)) if share else 0.0
        self.layers = [(self.outputs, Rule(threshold=cutoff) if share else Rule())]

    def make_weights(self, inputs: int, outputs: int) -> None:
        """Draws the weights, several times."""
        size = outputs * inputs * self.dtype.itemsize
        count = max(2, min(256, cuda_layouts.TRIAL_BYTES // size))
        normal = partial(torch.randn, outputs, inputs, dtype=self.dtype, device=self.device)
        self._weights = [input_major(normal() * 0.02) for _ in range(count)]

    def fastest(self) -> list[object]:
        """Gives the fastest tile, its seconds, and those in Triton."""
        tiles = {tile: self._compiled(tile) for tile in TILES}
        tile = min(tiles, key=lambda of: tiles[of])
        return [list(tile), tiles[tile], self._triton()]

    def taken(self) -> Input:
        """Says how the products of a block take their input."""
        if self.kind not in (NORMED, GATED):
            return Input()
        stream = Stream(self.x.numel(), 1.0, self.dtype, self.device)
        stream.begin(self.x)
        return Input(stream.sums, self.gain, 1e-5) if self.kind == NORMED else Input(stream.sums, gated=SILU)

    def _compiled(self, tile: Tile) -> float:
        place = None if self.kind == SINGLE else Sums(self.outputs, 1.0, self.device)
        taken, every = self.taken(), self.share == 0.0
        products = [
            VotingColumns(w, self.layers, taken=taken, place=place, reads_all=every, tile=tile) for w in self._weights
        ]
        x = self.x if taken.sums is None else None
        return seconds_per_call([partial(product, x) for product in products], self.device)

    def _triton(self) -> float:
        norm = None
        if self.kind == NORMED:
            norm = InputNorm(self.x.float().square().sum()[None], self.gain, 1e-5)
        try:
            products = [
                CudaColumns(w, self.layers, reads_all=self.share == 0.0, rests=self.share) for w in self._weights
            ]
        except SparsifierError:
            return float("inf")
        gated = SILU if self.kind == GATED else 0
        calls = [partial(product.fused, self.x[None, None], norm, gated) for product in products]
        return seconds_per_call(calls, self.device)
