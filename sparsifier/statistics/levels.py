"""Computes thresholds of mask functions from one streaming pass."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.mask_functions import MaskFunction
from resting.sparsifier.statistics.histogram import Histogram


class Levels:
    """Counts the levels that a mask function gives the channels of tokens, in bins of `Histogram`, signs apart.

    Parameters
    ----------
    function : MaskFunction
    """

    def __init__(self, function: MaskFunction) -> None:
        self.function = function
        self._above, self._below = Histogram(), Histogram()

    @classmethod
    def together(cls, levels: Iterable[Levels]) -> Levels:
        """Counts what all of `levels`, of one function, count."""
        first, *others = levels
        found = cls(first.function)
        found._above = Histogram.together(one._above for one in (first, *others))
        found._below = Histogram.together(one._below for one in (first, *others))
        return found

    def add(self, scores: Tensor) -> None:
        """Counts the levels of `scores` [tokens, channels], at least 0.

        Raises
        ------
        DivergedError
            If a level is NaN or infinite.
        """
        level = self.function.level(scores.detach().float())
        self._above.add(level[~(level < 0)])
        self._below.add(level[level < 0])

    def quantile(self, ratio: float) -> float:
        """Gives the threshold at which a share `ratio`, in [0, 1], of the channels of tokens rests; for 0 the neutral.

        Raises
        ------
        SparsifierError
            If nothing was counted, or `ratio` is outside of [0, 1].
        """
        if not 0.0 <= ratio <= 1.0:
            raise SparsifierError(f"a quantile is taken at a ratio in [0, 1], got {ratio}")
        above, below = int(self._above.counts.sum()), int(self._below.counts.sum())
        if not above + below:
            raise SparsifierError("the quantile of an empty histogram is not defined")
        if ratio == 0.0:
            return self.function.neutral
        rank = (1.0 - ratio if self.function.falls else ratio) * (above + below)
        if rank < below:
            found = -self._below.quantile(1.0 - rank / below)
        else:
            found = self._above.quantile((rank - below) / above) if above else 0.0
        return min(max(found, self.function.least), self.function.most)
