"""Chooses the form of products of codes, and the layouts of the voting one, by times of single launches."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from resting.sparsifier.decoding import cuda_layouts
from resting.sparsifier.decoding.cuda.choice import CHOSEN, KINDS, SHARES, SILU, Launch, Trial
from resting.sparsifier.decoding.cuda.codes import side_by_side
from resting.sparsifier.decoding.cuda.products import VotingColumns
from resting.sparsifier.decoding.cuda.quantised import Launch as ByTensorCores
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.variant import GATED, NORMED, Tile
from resting.sparsifier.decoding.cuda_products import InputNorm
from resting.sparsifier.decoding.cuda_quantised import QuantisedColumns
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.timing import seconds_per_call
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.weight import QuantisedWeight


class Layout(NamedTuple):
    """Says how a product of codes is divided: by lanes, and by warps and programs."""

    lane_bytes: int
    tile: Tile


LAYOUTS = {
    8: [
        *(Layout(8, Tile(4, 16, 8)), Layout(8, Tile(8, 16, 8)), Layout(8, Tile(16, 16, 8)), Layout(8, Tile(8, 32, 8))),
        *(Layout(16, Tile(4, 16, 8)), Layout(16, Tile(8, 16, 8)), Layout(16, Tile(4, 32, 8))),
    ],
    4: [
        *(Layout(4, Tile(8, 16, 8)), Layout(4, Tile(8, 32, 8)), Layout(4, Tile(16, 16, 8)), Layout(8, Tile(4, 32, 8))),
        *(Layout(8, Tile(8, 16, 8)), Layout(8, Tile(8, 32, 8)), Layout(16, Tile(4, 32, 8))),
    ],
}
"""What is tried, by bits of a code."""
USUAL = ByTensorCores(4, 8, 2)
"""The layout that stands for the form by tensor cores: its fastest or near it at all shapes on an H100."""


class CodesForm(NamedTuple):
    """Says which form of a block of codes was faster, and the layouts of the one that votes."""

    layouts: dict[Launch, Layout]
    voting: float
    """Seconds of its launches."""
    tensor_cores: float

    @property
    def wins(self) -> bool:
        """Tells whether the form that votes was faster."""
        return self.voting < self.tensor_cores

    def layout(self, kind: int, inputs: int, outputs: int, rests: bool) -> Layout:
        """Gives the layout of one of its launches."""
        return self.layouts[kind, inputs, outputs, rests]


def chosen_codes(launches: list[Launch], format: Format, like: Tensor, rests: float) -> CodesForm:
    """Chooses the form of a block by the sums of its launches' times, each measured once; as `chosen_form`."""
    share = min(SHARES, key=lambda known: abs(known - rests))
    layouts, voting, tensor_cores = {}, 0.0, 0.0
    for launch in launches:
        (lane_bytes, tile), ours, theirs = fastest_codes(launch, format, like, share if launch[3] else 0.0)
        layouts[launch] = Layout(lane_bytes, Tile(*tile))
        voting, tensor_cores = voting + ours, tensor_cores + theirs
    return CodesForm(layouts, voting, tensor_cores)


def fastest_codes(launch: Launch, format: Format, like: Tensor, share: float) -> tuple[list[Any], float, float]:
    """Gives the fastest layout for a launch, its seconds, and those of the same product by tensor cores."""
    kind, inputs, outputs, _ = launch
    what = f"{KINDS[kind]} {format.name} {inputs}x{outputs} {like.dtype}, {share:g} at rest"
    if what not in CHOSEN:
        found = remembered("layout", what, like.device, lambda: _Trial(launch, format, like, share).fastest())
        CHOSEN[what] = found[0], found[1], found[2]
    return CHOSEN[what]


class _Trial(Trial):
    """Times launches of one kind on random codes, many times as many as a cache holds."""

    def __init__(self, launch: Launch, format: Format, like: Tensor, share: float) -> None:
        self._format = format
        super().__init__(launch, like, share)

    def make_weights(self, inputs: int, outputs: int) -> None:
        outputs = -(-outputs // self._format.group) * self._format.group
        device, groups, half = self.device, outputs // self._format.group, 1 << (self._format.bits - 1)
        codes = torch.randint(1 - half, half, (inputs, outputs), dtype=torch.int8, device=device)
        scales = torch.full((inputs, groups), 0.02 / half, dtype=torch.float16, device=device)
        self._weight = QuantisedWeight(self._format, codes, scales)
        self._count = max(2, min(256, cuda_layouts.TRIAL_BYTES // (codes.numel() * self._format.bits // 8)))
        self.outputs = outputs

    def fastest(self) -> list[object]:
        times = {layout: self._voting(layout) for layout in LAYOUTS[self._format.bits]}
        best = min(times, key=lambda of: times[of])
        return [list(best), times[best], self._by_tensor_cores()]

    def _voting(self, layout: Layout) -> float:
        codes = side_by_side([self._weight], self.dtype, layout.lane_bytes)
        if not codes.fits(layout.tile):
            return float("inf")
        place = Sums(self.outputs, 1.0, self.device)
        taken = self.taken()
        every = self.share == 0.0
        copies = [codes, *(codes._replace(words=codes.words.clone()) for _ in range(self._count - 1))]
        products = [
            VotingColumns(c, self.layers, taken=taken, place=place, reads_all=every, tile=layout.tile) for c in copies
        ]
        x = None if taken.sums is not None else self.x
        return seconds_per_call([partial(product, x) for product in products], self.device)

    def _by_tensor_cores(self) -> float:
        norm = InputNorm(self.x.float().square().sum()[None], self.gain, 1e-5) if self.kind == NORMED else None
        rules = [rule for _, rule in self.layers]
        try:
            products = [
                QuantisedColumns([self._weight], rules, self.dtype, launch=USUAL, reads_all=self.share == 0.0)
                for _ in range(self._count)
            ]
        except SparsifierError:
            return float("inf")
        gated = SILU if self.kind == GATED else 0
        calls = [partial(product.fused, self.x[None, None], norm, gated) for product in products]
        return seconds_per_call(calls, self.device)
