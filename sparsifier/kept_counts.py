"""Adds up what masks keep, all masks of a forward together: one by one they are hundreds of launches on a GPU."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resting.sparsifier.policy import Selection
from resting.sparsifier.sites import Site


@dataclass
class Kept:
    """Holds what one mask keeps in one forward, until all of them are added up.

    Attributes
    ----------
    counts : Tensor [batch, length, 1]
        Entries of every token that are kept.
    selection : Selection
        The sparse tokens.
    width : int
        Channels of the input.
    sites : list of Site
        Where it is read.
    is_settled : bool
        Whether it is added up: what reads it later has to be counted by itself.
    """

    counts: Tensor
    selection: Selection
    width: int
    sites: list[Site] = field(default_factory=list)
    is_settled: bool = False


class KeptCounts:
    """Sums tokens times the share of their channels that is read, by site; on a GPU they stay there."""

    def __init__(self) -> None:
        self._waiting: list[Kept] = []
        self._sums: dict[tuple[tuple[Site, ...], ...], Tensor] = {}

    def add(self, kept: Kept) -> Kept:
        """Takes what a mask keeps; sites that read it too are added to it until `settle`."""
        self._waiting.append(kept)
        return kept

    def settle(self) -> None:
        """Adds up what came since the last time."""
        waiting, self._waiting = self._waiting, []
        alike: dict[tuple[int, int, torch.Size, torch.device], list[Kept]] = defaultdict(list)
        for kept in waiting:
            kept.is_settled = True
            alike[kept.width, id(kept.selection), kept.counts.shape, kept.counts.device].append(kept)
        for (width, *_), masks in alike.items():
            counts = masks[0].selection.of_sparse(torch.stack([kept.counts for kept in masks])).flatten(1)
            shares = counts.sum(1, dtype=torch.float64) / width  # whole numbers: exact in any order
            of = tuple(tuple(kept.sites) for kept in masks)
            self._sums[of] = self._sums[of] + shares if of in self._sums else shares

    def totals(self) -> dict[Site, float]:
        """Gives the sums, in one transfer from each device."""
        by_device: dict[torch.device, list[tuple[tuple[Site, ...], ...]]] = defaultdict(list)
        for of, sums in self._sums.items():
            by_device[sums.device].append(of)
        totals: dict[Site, float] = defaultdict(float)
        for keys in by_device.values():
            values = torch.cat([self._sums[of] for of in keys]).tolist()
            for sites, value in zip((sites for of in keys for sites in of), values):
                for site in sites:
                    totals[site] += value
        return totals
