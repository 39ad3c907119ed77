"""Defines the class that a method subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from resting.sparsifier.allocation import match, uniform
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.calibration import Calibration
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.mask_functions import THRESHOLD
from resting.sparsifier.named import Named
from resting.sparsifier.original import Original, Protocol
from resting.sparsifier.plan import Plan
from resting.sparsifier.roles import ACT, LINEAR_ROLES
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import Statistic, Statistics
from resting.sparsifier.transform import Transform


@dataclass
class Sparsifier(Named, ABC):
    """Decides which inputs of a decoder's linear layers rest.

    A method is a subclass with a `name` and a `rule`. Parameters are dataclass fields; a subclass that has some is
    decorated with ``@dataclass``.

    Parameters
    ----------
    target : float
        Model-wide byte sparsity, in [0, 1): the share of the block linears' weight bytes that a decode step leaves
        unread, measured, with what the method adds counted against it.
    topk : bool
        Keep an exact number of channels of every token, those of the largest score, instead of a threshold.
    protocol : {"common", "nominal", "original"}
        With ``"original"``, `target` is what the method's authors call so, and nothing is matched by measurement; with
        ``"nominal"``, it is the ratio at every site, and nothing is matched either.
    """

    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    """The sites it masks."""
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HISTOGRAM})
    mask: ClassVar[str] = THRESHOLD
    """The mask function (`Rule.mask`) whose thresholds ``statistics[site].score_quantile`` gives."""
    original: ClassVar[Original | None] = None
    """The setting of the method's authors."""
    needs_prompt: ClassVar[bool] = False
    """Whether its masks are made from a dense prompt: token policies without one are refused."""

    target: float = 0.5
    topk: bool = field(default=False, kw_only=True)
    protocol: Protocol = field(default="common", kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.target < 1.0:
            raise SparsifierError(f"target must be in [0, 1), got {self.target}")
        if self.protocol not in ("common", "nominal", "original"):
            raise SparsifierError(f"protocol must be common, nominal or original, got {self.protocol!r}")
        if self.protocol == "original" and self.original is None:
            raise SparsifierError(f"{self.name} has no original protocol; allowed: common")

    @abstractmethod
    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        """Gives the rule that lets a share `ratio`, in [0, 1], of the inputs of `site` rest.

        The `statistics` are those of the dense model: ``statistics[site].quantile(ratio)`` is the quantile of |x|.
        """

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        """Weighs each channel in the score ``scale * |x|``: [in], at least 0; None where all are alike.

        Where it is given, ``statistics[site].score_quantile`` in `rule` is the quantile of the score.
        """
        return None

    def centre(self, site: Site, statistics: Statistics) -> Tensor | None:
        """Gives what is subtracted from each channel before the score, [in]; None where nothing is.

        Where it is given, ``statistics[site].score_quantile`` in `rule` is the quantile of ``scale * |x - centre|``.
        """
        return None

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        """Gives the ratio at each site for a model-wide byte sparsity of `nominal`; uniform unless overridden."""
        if self.protocol != "common":
            return dict.fromkeys(calibrated.decoder.sites(self.roles), nominal)
        return uniform(calibrated.decoder, self.roles, nominal)

    def transform(self, calibrated: CalibratedModel) -> Transform | None:
        """Gives the transform of the model that it acts on; None, unless overridden, for the model as it is."""
        return None

    def masked_share(self, site: Site, ratio: float) -> float:
        """Gives the share of inputs that rest by `rule`: `ratio`, unless part of the budget goes elsewhere."""
        return ratio

    def fit(self, model: Any, calibration: Calibration, **options: Any) -> Plan:
        """Fits to a dense transformers `model`, which is left as it was; `options` go to `CalibratedModel`.

        A target above what the method's sites can leave unread raises `TargetUnreachableError`.
        """
        return self.plan_for(CalibratedModel(model, calibration, **options))

    def plan_for(self, calibrated: CalibratedModel) -> Plan:
        """Fits to `calibrated`, once: the plan is kept in it, and equal methods share it."""
        return calibrated.plan(self, lambda: calibrated.rewritten(self.transform, self.fit_calibrated))

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        """Fits so that measured bytes meet the target: the step that a method overrides; callers want `plan_for`."""
        if self.protocol != "common":
            return self.plan_at(calibrated, self.target)
        # Where all inputs are masked, those of a sparse model are smaller: a first guess that is often near.
        start = self.target - 0.09 * self.target**2 if self.roles == LINEAR_ROLES else self.target
        plan, measured = match(lambda at: self.plan_at(calibrated, at), calibrated.measure, self.target, start)
        return replace(plan, info=plan.info | {"matched": measured})

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        """Makes the plan for a byte sparsity of `nominal` by the dense model's statistics, not yet matched."""
        return calibrated.rewritten(self.transform, lambda rewritten: self._plan_at(rewritten, nominal))

    def _plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        calibrated.decoder.check_roles(self.roles)
        ratios, statistics = self.ratios(calibrated, nominal), self.statistics(calibrated)
        rules = {site: self.rule_or_topk(site, statistics, ratio) for site, ratio in ratios.items()}
        info: dict[str, Any] = {"ratios": {str(site): round(ratio, 6) for site, ratio in ratios.items()}}
        if statistics.rare:  # statistics of all experts together stand in for theirs
            info["experts_with_few_tokens"] = len({(site.block, site.part) for site in statistics.rare})
        return Plan(rules, self.label, self.target, nominal, *calibrated.identity, info, transform=calibrated.transform)

    def statistics(self, calibrated: CalibratedModel) -> Statistics:
        """Gathers what `rule` is given: the dense model's statistics, with scores where there is a `scale`."""
        known, sites = calibrated.statistics(self.needs), calibrated.decoder.sites(self.roles)
        scales = {site: scale for site in sites if (scale := self.scale(site, known)) is not None}
        centres = {site: centre for site in sites if (centre := self.centre(site, known)) is not None}
        if self.mask != THRESHOLD or centres:  # |x| is not what is compared anywhere
            scales = dict.fromkeys(sites, torch.ones(())) | scales
        return calibrated.scored(self.needs, scales, centres, self.mask)

    def rule_or_topk(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        """Gives `rule`, in its top-k form where `topk` is set."""
        rule = self.rule(site, statistics, ratio)
        if not self.topk or rule.masks_nothing:
            return rule
        width = statistics.weight(site._replace(role="down") if site.role == ACT else site).shape[1]
        return replace(rule, threshold=0.0, mask=THRESHOLD, topk=round(width * (1.0 - self.masked_share(site, ratio))))
