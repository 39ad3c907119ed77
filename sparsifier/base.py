"""Defines the class that a method subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from resting.sparsifier.allocation import match, uniform
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.calibration import Calibration
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.named import Named
from resting.sparsifier.original import Original, Protocol
from resting.sparsifier.plan import Plan
from resting.sparsifier.planning import plan_of
from resting.sparsifier.roles import LINEAR_ROLES
from resting.sparsifier.rule import Rule
from resting.sparsifier.scoring import scored
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
    mask: ClassVar[str] = "threshold"
    """The mask function (`Rule.mask`) whose thresholds ``statistics[site].score_quantile`` gives."""
    original: ClassVar[Original | None] = None
    """The setting of the method's authors."""
    is_bound: ClassVar[bool] = False
    """Whether it looks at what it lets rest, and so only bounds what others can: the page never calls it the best."""
    needs_prompt: ClassVar[bool] = False  # where masks are made from a dense prompt: policies without one are refused

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

        The `statistics` are those of the dense model: ``statistics[site].quantile(ratio)`` is the quantile of |x|,
        and ``score_quantile(ratio)`` that of the score, where `scale`, `centre` or `mask` make it another.
        """

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        """Weighs each channel in the score ``scale * |x - centre|``: [in], at least 0; None where all are alike."""
        return None

    def centre(self, site: Site, statistics: Statistics) -> Tensor | None:
        """Gives what is taken off each channel in the score, [in]; None where nothing is."""
        return None

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        """Gives the ratio at each site for a model-wide byte sparsity of `nominal`; uniform unless overridden."""
        if self.protocol != "common":
            return dict.fromkeys(calibrated.decoder.sites(self.roles), nominal)
        return uniform(calibrated.decoder, self.roles, nominal)

    def transform(self, calibrated: CalibratedModel) -> Transform | None:
        """Gives the transform of the model that it acts on; None, unless overridden, for the model as it is."""
        return None

    @property
    def replaces_weights(self) -> bool:
        """Tells whether its plans bring weights of their own (`Rule.weight`): not so, unless overridden."""
        return False

    def masked_share(self, site: Site, ratio: float) -> float:
        """Gives the share of inputs that rest by `rule`: `ratio`, unless part of the budget goes elsewhere."""
        return ratio

    def fit(self, model: Any, calibration: Calibration, **options: Any) -> Plan:
        """Fits to a dense `model`, left as it was, or raises `TargetUnreachableError`. `options`: `CalibratedModel`."""
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
        return calibrated.rewritten(self.transform, lambda rewritten: plan_of(self, rewritten, nominal))

    def statistics(self, calibrated: CalibratedModel) -> Statistics:
        """Gathers what `rule` is given: the dense model's statistics, with scores where they are not |x|."""
        return scored(self, calibrated)

    def rule_or_topk(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        """Gives `rule`, in its top-k form where `topk` is set."""
        rule = self.rule(site, statistics, ratio)
        if not self.topk or rule.masks_nothing:
            return rule
        return rule.with_topk(round(statistics.width(site) * (1.0 - self.masked_share(site, ratio))))
