"""Defines the base of methods that choose neurons of gated MLPs."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from resting.sparsifier.base import Sparsifier
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import TargetUnreachableError
from resting.sparsifier.neurons.mask import SCORES, NeuronMask
from resting.sparsifier.neurons.sequence import check_prompt, has_prompt
from resting.sparsifier.plan import Plan
from resting.sparsifier.roles import NEURONS
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import Statistic, Statistics


@dataclass
class NeuronSparsifier(Sparsifier):
    """Lets the same share of the neurons of every gated MLP rest: the base of methods that choose neurons.

    A method is a subclass with a `name`, a `score` and `masks`. Attention stays dense, so that the byte sparsity of a
    model has a ceiling: the share of its MLPs, less what a score reads.
    """

    roles: ClassVar[tuple[str, ...]] = (NEURONS,)
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    @property
    @abstractmethod
    def score(self) -> str:
        """Names the registered score of its masks."""

    @abstractmethod
    def masks(self, calibrated: CalibratedModel, share: float) -> dict[Site, NeuronMask]:
        """Gives the mask of every gated MLP that lets a share of its neurons, in (0, 1], rest."""

    def extra_elements(self, hidden: int, neurons: int) -> float:
        """Counts what a mask of an MLP of this width will read for every token, as `NeuronMask.extra_elements`."""
        return 0.0

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule()

    @property
    def needs_prompt(self) -> bool:  # type: ignore[override]
        return SCORES[self.score].asks_for_prompt

    def ceiling(self, decoder: Decoder) -> float:
        """Gives the largest byte sparsity: that of a model in which all neurons rest."""
        return (self._covered(decoder) - self._extra(decoder)) / decoder.elements

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        decoder = calibrated.decoder
        sites = decoder.neuron_sites()
        if self.protocol != "common":
            return dict.fromkeys(sites, nominal)
        if nominal > (ceiling := self.ceiling(decoder)):
            raise TargetUnreachableError(
                f"byte sparsity {nominal:g} is above this method's ceiling of {ceiling:.3f} on this model"
            )
        wanted = nominal * decoder.elements + self._extra(decoder)
        return dict.fromkeys(sites, wanted / self._covered(decoder) if nominal else 0.0)

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        ratios = self.ratios(calibrated, nominal)
        masks = self.masks(calibrated, next(iter(ratios.values()))) if nominal else {}
        info = {"ratios": {str(site): round(ratio, 6) for site, ratio in ratios.items()}}
        return Plan({}, self.label, self.target, nominal, *calibrated.identity, info, neurons=masks)

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        if not self.needs_prompt or not self.target or self.protocol != "common":
            return super().fit_calibrated(calibrated)
        calibration = calibrated.calibration
        calibrated.decoder.neuron_sites()  # a model that has none is refused first
        check_prompt(calibration.tokens, self.label)
        plan = self.plan_at(calibrated, self.target)  # an exact number is kept: there is nothing to be matched
        windows = calibration.windows if calibration.matching is None else calibration.matching
        # Where the whole window is a prompt nothing is sparse, and the number kept gives the bytes.
        measured = calibrated.measure(plan) if has_prompt(calibration.policy(windows)) else plan.nominal
        return replace(plan, info=plan.info | {"matched": measured})

    def kept(self, neurons: int, share: float) -> int:
        """Counts the neurons that are kept where a `share` rests."""
        return min(neurons, max(0, round((1.0 - share) * neurons)))

    def _covered(self, decoder: Decoder) -> float:
        """Counts the weights that a token leaves unread when all neurons rest."""
        whole = SCORES[self.score].reads_whole
        found = [decoder.rests_under_neurons(site, whole) for site in decoder.neuron_sites()]
        return sum(share * decoder.elements_at(site) for under in found for site, share in under.items())

    def _extra(self, decoder: Decoder) -> float:
        return sum(self.extra_elements(*decoder.mlp_shape(site)) for site in decoder.neuron_sites())
