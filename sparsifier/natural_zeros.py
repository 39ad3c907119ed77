"""Finds inputs that no rule masks and that are sparse all the same, as after a ReLU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from resting.sparsifier.policy import Selection, count
from resting.sparsifier.sites import Site

NATURAL = 0.05
"""Share of exact zeros from which an input that no rule masks counts as sparse by nature.

What lies below are accidents: products that underflow, a channel whose norm has weight 0. SiLU and GELU give less than
0.004 in any block of the models tried.
"""
LOOK = 2**16
"""Entries of such an input after which it is known whether its zeros are worth counting."""


class NaturalZeros:
    """Decides, site by site, whether exact zeros count: by the first `LOOK` entries, then by all that was seen.

    A site that is found to have few is counted no more. What a GPU has not computed yet is looked up before the next
    forward. Until then its site is counted on, which changes nothing: of a site with few zeros no count is used.

    Attributes
    ----------
    sites : set of Site
        What was looked at.
    few : set of Site
        What has few zeros.
    """

    def __init__(self) -> None:
        self.sites: set[Site] = set()
        self.few: set[Site] = set()
        self._looked: dict[Site, int] = defaultdict(int)
        self._first: list[tuple[Site, Tensor, int]] = []  # what is not zero in the first entries, and their number
        self._due: set[Site] = set()

    def begin(self, site: Site, x: Tensor, selection: Selection, counts: Tensor | None) -> bool:
        """Takes note of an input `x` [batch, length, channels], and tells whether its zeros are to be counted.

        `counts` [batch, length, 1] are the entries of every token that are not zero, where they are known.
        """
        self.sites.add(site)
        width = x.shape[-1]
        if site not in self._looked:
            if counts is None:
                sample, entries = selection.first(x, LOOK), 1
            else:
                sample, entries = selection.first(counts, -(-LOOK // width)), width
            if (size := sample.numel() * entries) >= LOOK:
                kept = count(sample) if counts is None else sample
                if isinstance(kept, Tensor):
                    self._first.append((site, kept, size))
                elif self._are_few(site, kept, size):
                    return False
        self._looked[site] += selection.tokens
        if self._looked[site] * width >= LOOK:
            self._due.add(site)
        return True

    def settle(self, read: Callable[[], Mapping[Site, float]]) -> None:
        """Decides on what was seen since the last time; `read` gives tokens times the share that is not zero."""
        first, self._first = self._first, []
        due, self._due = self._due, set()
        alike: dict[tuple[torch.Size, torch.device], list[tuple[Site, Tensor, int]]] = defaultdict(list)
        for found in first:
            alike[found[1].shape, found[1].device].append(found)
        for group in alike.values():
            sums = torch.stack([kept.reshape(-1) for _, kept, _ in group]).sum(1, dtype=torch.float64)
            for (site, _, size), kept in zip(group, sums.tolist()):
                self._are_few(site, kept, size)
        if due := due - self.few:
            seen = read()
            for site in due:
                self._are_few(site, seen.get(site, 0.0), self._looked[site])

    def _are_few(self, site: Site, kept: float, of: float) -> bool:
        few = 1.0 - kept / of < NATURAL
        if few:
            self.few.add(site)
        return few
