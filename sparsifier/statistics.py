"""One streaming pass over calibration text, for all methods and all ratios."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from sparsifier.calibration import Calibration
from sparsifier.errors import NonFiniteError, SparsifierError
from sparsifier.logits import final_hidden
from sparsifier.policy import TokenPolicy
from sparsifier.sites import ACT, INPUT_OF, LINEAR_ROLES, Decoder, Site
from sparsifier.tokens import TokenTracker

MANTISSA_BITS = 8
LOWEST, HIGHEST = 2.0**-32, 2.0**32
_SHIFT = 23 - MANTISSA_BITS
_FIRST = int(torch.tensor(LOWEST).view(torch.int32)) >> _SHIFT
BINS = (int(torch.tensor(HIGHEST).view(torch.int32)) >> _SHIFT) - _FIRST


class Histogram:
    """Counts of |x| in bins a 256th of a power of two wide, from 2^-32 to 2^32.

    A bin is the leading bits of the float, so that one pass suffices: no range has to be known beforehand, and no
    outlier costs resolution (the quantile is exact to 0.4 % of its value).
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.int64)

    def add(self, x: Tensor) -> None:
        """Count the magnitudes of all entries of `x`.

        Raises
        ------
        NonFiniteError
            If an entry is NaN or infinite.
        """
        bits = x.detach().float().abs().flatten().view(torch.int32)
        if bits.numel() and int(bits.max()) >= 0x7F800000:
            raise NonFiniteError("an activation is NaN or infinite")
        index = ((bits >> _SHIFT) - _FIRST).clamp_(0, BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS).cpu()

    def quantile(self, ratio: float) -> float:
        """The magnitude that a share `ratio` of the entries does not exceed, interpolated inside its bin.

        Parameters
        ----------
        ratio : float
            In [0, 1]; 0 gives 0, so that nothing but exact zeros rests.
        """
        if not 0.0 <= ratio <= 1.0:
            raise SparsifierError(f"a quantile is taken at a ratio in [0, 1], got {ratio}")
        total = int(self.counts.sum())
        if not total:
            raise SparsifierError("the quantile of an empty histogram is not defined")
        wanted = ratio * total
        if wanted <= 0:
            return 0.0
        cumulative = self.counts.cumsum(0)
        index = min(int(torch.searchsorted(cumulative, torch.tensor(wanted, dtype=torch.float64))), BINS - 1)
        inside = int(self.counts[index])
        share = (wanted - (int(cumulative[index]) - inside)) / inside if inside else 1.0
        low, high = _edge(index), _edge(index + 1)
        return low + share * (high - low)


def _edge(index: int) -> float:
    bits = torch.tensor((index + _FIRST) << _SHIFT, dtype=torch.int32)
    return 0.0 if index == 0 else float(bits.view(torch.float32))


class Statistic(Enum):
    """What can be gathered at a site; a method names what it needs."""

    HISTOGRAM = "histogram"


@dataclass
class SiteStatistics:
    """What was gathered at one site; sites that read the same tensor share one."""

    histogram: Histogram | None = None

    def quantile(self, ratio: float) -> float:
        """Quantile of |x| (`Histogram.quantile`)."""
        if self.histogram is None:
            raise SparsifierError("a histogram is needed here: add Statistic.HISTOGRAM to the method's `needs`")
        return self.histogram.quantile(ratio)

    def add(self, x: Tensor) -> None:
        if self.histogram is not None:
            self.histogram.add(x)


@dataclass
class Statistics:
    """Statistics of a dense model on calibration text, by site."""

    sites: dict[Site, SiteStatistics] = field(default_factory=dict)

    def __getitem__(self, site: Site) -> SiteStatistics:
        if site not in self.sites:
            raise SparsifierError(f"no statistics at site {site}; there are {len(self.sites)} sites")
        return self.sites[site]

    @classmethod
    def collect(
        cls,
        model: nn.Module,
        calibration: Calibration,
        needs: Iterable[Statistic] = (Statistic.HISTOGRAM,),
        progress: Callable[[int, int], None] | None = None,
    ) -> Statistics:
        """Run the dense model once over `calibration.statistics_windows` windows.

        Padding is left out. Tokens that the policy keeps dense are left out too: the mask never sees them.
        """
        decoder = Decoder.of(model)
        roles = [*LINEAR_ROLES, *([ACT] if ACT in decoder.roles else [])]
        wanted = set(needs)
        shared: dict[tuple[int, str], SiteStatistics] = {}
        statistics = cls()
        for site in decoder.sites(tuple(roles)):
            key = (site.block, INPUT_OF.get(site.role, ACT))
            if key not in shared:
                shared[key] = SiteStatistics(Histogram() if Statistic.HISTOGRAM in wanted else None)
            statistics.sites[site] = shared[key]
        if not wanted:
            return statistics

        first_readers = {id(s): site for site, s in reversed(list(statistics.sites.items()))}

        def gather(site: Site, x: Tensor) -> None:
            try:
                statistics.sites[site].add(x)
            except NonFiniteError as error:
                raise NonFiniteError(f"{error} at site {site} of the dense model on the calibration text") from None

        run_watched(model, calibration, list(first_readers.values()), gather, progress)
        return statistics


@torch.no_grad()
def run_watched(
    model: nn.Module,
    calibration: Calibration,
    sites: Iterable[Site],
    see: Callable[[Site, Tensor], None],
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Run `model` over the statistics windows and show `see` the sparse tokens' tensor at each of `sites`.

    At a linear site it is the input, at `ACT` the output of the activation; shape [tokens, channels].
    """
    total = min(calibration.statistics_windows, len(calibration.windows))
    device = next(model.parameters()).device
    done = 0
    with _watching(Decoder.of(model), calibration.policy(calibration.windows), sites, see):
        for ids, mask in calibration.statistics_batches():
            final_hidden(model, ids.to(device), None if mask is None else mask.to(device))
            done += len(ids)
            if progress:
                progress(done, total)


@contextmanager
def _watching(
    decoder: Decoder, policy: TokenPolicy, sites: Iterable[Site], see: Callable[[Site, Tensor], None]
) -> Iterator[None]:
    tracker = TokenTracker(policy)
    handles = [tracker.watch(decoder.trunk)]

    def show(site: Site, x: Tensor) -> None:
        see(site, tracker.selection.take(x))

    def before(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: show(site, args[0])

    def after(site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, args, output: show(site, output)

    try:
        for site in sites:
            module = decoder.slots[site].module
            if site.role == ACT:
                handles.append(module.register_forward_hook(after(site)))
            else:
                handles.append(module.register_forward_pre_hook(before(site)))
        yield
    finally:
        for handle in handles:
            handle.remove()
