"""Gathers statistics in one streaming pass over calibration text, for all methods and all ratios."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from resting.sparsifier.calibration import Calibration
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import DivergedError, SparsifierError
from resting.sparsifier.low_rank import Algorithm, Factors
from resting.sparsifier.mask_functions import THRESHOLD, mask_function
from resting.sparsifier.progress import OnProgress, silent
from resting.sparsifier.roles import ACT, INPUT_OF, LINEAR_ROLES
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics.channel_moments import ChannelMoments
from resting.sparsifier.statistics.gram import Gram
from resting.sparsifier.statistics.histogram import Histogram
from resting.sparsifier.statistics.levels import Levels
from resting.sparsifier.statistics.moments import Moments
from resting.sparsifier.statistics.watching import run_watched
from resting.sparsifier.weights import check_weights


class Statistic(Enum):
    """Names what can be gathered at a site; a method says what it needs."""

    HISTOGRAM = "histogram"
    """A histogram of |x|, at every site."""
    UP = "up"
    """Moments of what the activated gate is multiplied with, channel by channel, at `ACT`."""
    MOMENTS = "moments"
    """Signed mean and variance of x, channel by channel, at every site."""
    GRAM = "gram"
    """The second moment of a linear layer's input, [in, in] in fp64: at down of a wide model gigabytes a block."""


@dataclass
class SiteStatistics:
    """Holds what was gathered at one site; sites that read the same tensor share histogram and moments.

    Attributes
    ----------
    histogram : Histogram, optional
        Counts |x|.
    scores : Histogram, optional
        Counts ``scale * |x - centre|``, where a method gave one of them (`Sparsifier.scale`, `Sparsifier.centre`);
        where it has a mask function of its own (`Sparsifier.mask`), the levels that this gives them.
    up : Moments, optional
        Sums up the up projection's output, at `ACT`.
    input : ChannelMoments, optional
        Has mean and variance of x.
    gram : Gram, optional
        Sums up x x^T, at linear layers.
    tokens : int
        Tokens that were seen.
    """

    histogram: Histogram | None = None
    scores: Histogram | Levels | None = None
    up: Moments | None = None
    input: ChannelMoments | None = None
    gram: Gram | None = None
    tokens: int = 0

    def quantile(self, ratio: float) -> float:
        """Gives the quantile of |x| (`Histogram.quantile`)."""
        if self.histogram is None:
            raise SparsifierError("a histogram is needed here: add Statistic.HISTOGRAM to the method's `needs`")
        return self.histogram.quantile(ratio)

    def score_quantile(self, ratio: float) -> float:
        """Gives the quantile of ``scale * |x - centre|``, or the mask function's threshold for this ratio."""
        if self.scores is None:
            raise SparsifierError("a histogram of scores is needed here: give the site a scale (`Sparsifier.scale`)")
        return self.scores.quantile(ratio)

    def moments(self) -> ChannelMoments:
        """Gives the mean and variance of x, [in]."""
        if self.input is None:
            raise SparsifierError("moments of the input are needed here: add Statistic.MOMENTS to the method's `needs`")
        return self.input

    def up_moments(self) -> Moments:
        """Gives the moments of the up projection's output, [channels]."""
        if self.up is None:
            raise SparsifierError(
                "moments of up are needed here: the activation must be a gate's (this MLP may have none), and the "
                "method's `needs` must hold Statistic.UP"
            )
        return self.up

    def second_moment(self) -> Tensor:
        """Gives E[x x^T], [in, in] in fp64."""
        if self.gram is None:
            raise SparsifierError("a second moment is needed here: add Statistic.GRAM to the method's `needs`")
        return self.gram.second_moment


@dataclass
class Statistics:
    """Holds the statistics of a dense model on calibration text, by site, and its weights.

    Attributes
    ----------
    decoder : Decoder
    factors : Factors
    sites : dict of Site to SiteStatistics
        As gathered.
    rare : dict of Site to SiteStatistics
        Those of all experts of a block together, for the experts that too few tokens came to
        (`Calibration.expert_tokens`).
    """

    decoder: Decoder
    factors: Factors = field(default_factory=Factors)
    sites: dict[Site, SiteStatistics] = field(default_factory=dict)
    rare: dict[Site, SiteStatistics] = field(default_factory=dict)

    def __getitem__(self, site: Site) -> SiteStatistics:
        if site not in self.sites:
            raise SparsifierError(f"no statistics at site {site}; there are {len(self.sites)} sites")
        return self.rare.get(site, self.sites[site])

    def weight(self, site: Site) -> Tensor:
        """Gives the matrix at `site`, [out, in]."""
        return self.decoder.projection(site).weight.detach()

    def width(self, site: Site) -> int:
        """Counts the channels at `site`: at `ACT` those that down reads."""
        return self.weight(site._replace(role="down") if site.role == ACT else site).shape[1]

    def column_norms(self, site: Site) -> Tensor:
        """Computes ||W[:, i]||_2, [in] in fp32: what input channel i can do to the output."""
        norms = self.weight(site).float().norm(dim=0).cpu()
        if not bool(torch.isfinite(norms).all()):
            raise DivergedError(f"the column norms of the weight at {site} are NaN, or beyond the range of float32")
        return norms

    def low_rank(self, site: Site, rank: int, algorithm: Algorithm = "exact") -> tuple[Tensor, Tensor]:
        """Gives the best approximation of the weight by `rank`: U [out, rank], V [rank, in] in fp32 (`Factors`)."""
        return self.factors.low_rank(self.weight(site), rank, algorithm)

    @classmethod
    def collect(
        cls,
        model: Any,
        calibration: Calibration,
        needs: Iterable[Statistic] = (Statistic.HISTOGRAM,),
        on_progress: OnProgress = silent,
        factors: Factors | None = None,
    ) -> Statistics:
        """Runs the dense model once over `calibration.statistics_windows` windows.

        Padding is left out, and so are the first tokens that `calibration.statistics_policy` keeps dense.
        """
        decoder = Decoder.of(model)
        check_weights(decoder)
        wanted = set(needs)
        statistics = cls(decoder, factors or Factors())
        shared: dict[tuple[int, str, str], SiteStatistics] = {}
        for site in decoder.sites((*LINEAR_ROLES, ACT)):
            reads = (site.block, site.part, INPUT_OF.get(site.role, ACT))
            if reads not in shared:
                shared[reads] = SiteStatistics(
                    Histogram() if Statistic.HISTOGRAM in wanted else None,
                    input=ChannelMoments() if Statistic.MOMENTS in wanted else None,
                    gram=Gram() if Statistic.GRAM in wanted and site.role != ACT else None,
                )
            statistics.sites[site] = shared[reads]
        if not wanted:
            return statistics

        def see(site: Site, x: Tensor) -> None:
            found = statistics.sites[site]
            found.tokens += len(x)
            with _at(site):
                for one in (found.histogram, found.input, found.gram):
                    if one is not None:
                        one.add(x)

        def see_up(site: Site, x: Tensor) -> None:
            act = statistics.sites[site._replace(role=ACT)]
            act.up = act.up or Moments()
            with _at(site):
                act.up.add(x)

        first_readers = {id(s): site for site, s in reversed(list(statistics.sites.items()))}
        acts = decoder.sites((ACT,)) if Statistic.UP in wanted else []
        # The matrix that the activated gate is multiplied with comes first; without a gate there is none.
        ups = [next(iter(under)) for under in map(decoder.rests_under_act, acts) if len(under) > 1]
        run_watched(model, calibration, list(first_readers.values()), see, "statistics", on_progress, ups, see_up)
        return statistics._with_rare(calibration.expert_tokens)

    def _with_rare(self, least: int) -> Statistics:
        """Puts what all experts of a block saw together in the place of what too few tokens gave."""
        groups: dict[tuple[int, str], list[Site]] = {}
        for site in self.sites:
            if site.is_expert:
                groups.setdefault((site.block, site.group), []).append(site)
        rare: dict[Site, SiteStatistics] = {}
        for sites in groups.values():
            few = [site for site in sites if self.sites[site].tokens < least]
            if few:
                rare |= dict.fromkeys(few, _together([self.sites[site] for site in sites]))
        return replace(self, rare=rare)

    @staticmethod
    def grams(
        model: Any, calibration: Calibration, sites: Iterable[Site], on_progress: OnProgress = silent
    ) -> dict[Site, Gram]:
        """Gathers second moments at `sites` alone, in a pass of their own: `Statistic.GRAM` is one for all sites."""
        found = {site: Gram() for site in sites}

        def see(site: Site, x: Tensor) -> None:
            with _at(site):
                found[site].add(x)

        run_watched(model, calibration, list(found), see, "second moments", on_progress)
        return found

    def scored(
        self,
        model: Any,
        calibration: Calibration,
        scales: Mapping[Site, Tensor],
        on_progress: OnProgress = silent,
        centres: Mapping[Site, Tensor] | None = None,
        mask: str = THRESHOLD,
    ) -> Statistics:
        """Adds a histogram of ``scale * |x - centre|``, or of its levels under `mask`, at the sites of `scales`.

        It takes one more pass.

        Parameters
        ----------
        scales : mapping of Site to Tensor [in] or scalar
            At least 0.
        centres : mapping of Site to Tensor [in], optional
            Zero where there is none.
        mask : str
            The name of a mask function.
        """
        function = mask_function(mask)
        scores = {site: Histogram() if mask == THRESHOLD else Levels(function) for site in scales}
        scales = {site: scale.float() for site, scale in scales.items()}
        moved = {site: centre.float() for site, centre in (centres or {}).items()}

        def see(site: Site, x: Tensor) -> None:
            with _at(site):
                x = x.float() - moved[site].to(x.device) if site in moved else x.float()
                scores[site].add(x.abs() * scales[site].to(x.device))

        run_watched(model, calibration, list(scales), see, "scores", on_progress)
        sites = {s: replace(known, scores=scores.get(s)) for s, known in self.sites.items()}
        return replace(self, sites=sites)._with_rare(calibration.expert_tokens)


def _together(of: list[SiteStatistics]) -> SiteStatistics:
    """Counts together what several sites saw."""
    found = SiteStatistics(tokens=sum(one.tokens for one in of))
    for name in ("histogram", "scores", "up", "input", "gram"):
        parts = [part for one in of if (part := getattr(one, name)) is not None]
        if parts:
            setattr(found, name, type(parts[0]).together(parts))
    return found


@contextmanager
def _at(site: Site) -> Iterator[None]:
    """Names `site` where activations there are not finite."""
    try:
        yield
    except DivergedError as error:
        raise DivergedError(f"{error} at site {site} of the dense model on the calibration text") from None
