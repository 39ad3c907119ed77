"""The class that a baseline subclasses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from resting.sparsifier import allocation
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.calibration import Calibration
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.original import Original, Protocol
from resting.sparsifier.plan import Plan
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import ACT, LINEAR_ROLES, Decoder, Site
from resting.sparsifier.statistics import Statistic, Statistics


@dataclass
class Sparsifier(ABC):
    """Decides which inputs of a decoder's linear layers rest.

    A method is a subclass with a `name` and a `rule`. Parameters are dataclass fields; a subclass that has some is
    decorated with ``@dataclass``.

    Parameters
    ----------
    target : float
        Model-wide byte sparsity, in [0, 1): the share of the block linears' weight bytes that a decode step leaves
        unread, measured, with what the method adds counted against it.
    topk : bool
        Keep an exact number of channels of every token, those of the largest score, instead of those whose score
        exceeds a threshold.
    protocol : {"common", "original"}
        With ``"original"``, `target` is what the method's authors call so, and nothing is matched by measurement.
    """

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]] = LINEAR_ROLES
    """The sites it masks."""
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HISTOGRAM})
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Parameter settings that suites and results know as methods of their own, by name."""
    original: ClassVar[Original | None] = None
    """The setting of the method's authors."""

    target: float = 0.5
    topk: bool = field(default=False, kw_only=True)
    protocol: Protocol = field(default="common", kw_only=True)

    def __post_init__(self) -> None:
        if not 0.0 <= self.target < 1.0:
            raise SparsifierError(f"target must be in [0, 1), got {self.target}")
        if self.protocol not in ("common", "original"):
            raise SparsifierError(f"protocol must be common or original, got {self.protocol!r}")
        if self.protocol == "original" and self.original is None:
            raise SparsifierError(f"{self.name} has no original protocol; allowed: common")

    @abstractmethod
    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        """The rule that lets a share `ratio` of the inputs of `site` rest.

        Parameters
        ----------
        site : Site
        statistics : Statistics
            Of the dense model; ``statistics[site].quantile(ratio)`` is the quantile of |x|.
        ratio : float
            In [0, 1].
        """

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        """Weight of each channel in the score ``scale * |x|``, [in], at least 0; None where all are alike.

        Where it is given, ``statistics[site].score_quantile`` in `rule` is the quantile of the score.
        """
        return None

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        """The ratio at each site for a model-wide byte sparsity of `nominal`; uniform unless overridden."""
        if self.protocol == "original":
            return dict.fromkeys(calibrated.decoder.sites(self.roles), nominal)
        return allocation.uniform(calibrated.decoder, self.roles, nominal)

    def masked_share(self, site: Site, ratio: float) -> float:
        """Share of inputs that the mask of `rule` lets rest; `ratio`, unless part of the budget goes elsewhere."""
        return ratio

    @property
    def label(self) -> str:
        """The name in results."""
        return f"{self._variant}{'-topk' if self.topk else ''}{', original' if self.protocol == 'original' else ''}"

    @property
    def _variant(self) -> str:
        """The name, or that of the variant whose parameters it has."""
        names = [n for n, v in self.variants.items() if all(getattr(self, k) == value for k, value in v.items())]
        return names[-1] if names else self.name

    @property
    def has_seed(self) -> bool:
        """Whether it draws random numbers, by its parameter `seed`."""
        return hasattr(self, "seed")

    def spec(self) -> dict[str, Any]:
        """All that determines the method's plan on a given model and text, as JSON values."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {"name": self.name} | {k: v.spec() if isinstance(v, Sparsifier) else v for k, v in values.items()}

    def fit(self, model: Any, calibration: Calibration, **options: Any) -> Plan:
        """Fit to `model`.

        Parameters
        ----------
        model : transformers.PreTrainedModel
            Dense; it is left as it was.
        calibration : Calibration
        **options
            Passed to `CalibratedModel`: ``report``, ``folder``.

        Raises
        ------
        TargetUnreachableError
            If the method's sites cannot leave so many bytes unread.
        """
        return CalibratedModel(model, calibration, **options).plan(self)

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        """The plan whose measured byte sparsity meets the target; `fit` and the harness call it."""
        if self.protocol == "original":
            return self.plan_at(calibrated, self.target)
        # Where all inputs are masked, those of a sparse model are smaller: a first guess that is often near.
        start = self.target - 0.09 * self.target**2 if self.roles == LINEAR_ROLES else self.target
        plan, measured = allocation.match(
            lambda nominal: self.plan_at(calibrated, nominal), calibrated.measure, self.target, start
        )
        return replace(plan, info=plan.info | {"matched": measured})

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        """The plan for a byte sparsity of `nominal` by the dense model's statistics, not yet matched."""
        calibrated.decoder.check_roles(self.roles)
        ratios = self.ratios(calibrated, nominal)
        statistics = self.statistics(calibrated)
        rules = {site: self.rule_or_topk(site, statistics, ratio) for site, ratio in ratios.items()}
        info = {"ratios": {str(site): round(ratio, 6) for site, ratio in ratios.items()}}
        return calibrated.new_plan(self, rules, nominal, info)

    def statistics(self, calibrated: CalibratedModel) -> Statistics:
        """What `rule` is given: the dense model's statistics, with scores where there is a `scale`."""
        known = calibrated.statistics(self.needs)
        scales = {site: self.scale(site, known) for site in calibrated.decoder.sites(self.roles)}
        return calibrated.scored(self.needs, {site: scale for site, scale in scales.items() if scale is not None})

    def rule_or_topk(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        """`rule`, in its top-k form where `topk` is set."""
        rule = self.rule(site, statistics, ratio)
        if not self.topk or rule.masks_nothing:
            return rule
        width = statistics.weight(Site(site.block, "down") if site.role == ACT else site).shape[1]
        return replace(rule, threshold=0.0, topk=round(width * (1.0 - self.masked_share(site, ratio))))


@dataclass
class Compensated(Sparsifier):
    """A sparsifier that takes the masks of another and adds biases: the base of methods that wrap.

    Parameters
    ----------
    inner : Sparsifier
        Gives masks and target.
    sites : tuple of str
        Roles of the linear layers that get a bias.
    """

    target: float = field(init=False, default=0.0)
    topk: bool = field(init=False, default=False)
    protocol: Protocol = field(init=False, default="common")
    inner: Sparsifier
    sites: tuple[str, ...] = ("down",)

    wraps_compensated: ClassVar[bool] = False
    """Whether `inner` may add biases itself: masks are taken from the sparsifier at the bottom."""

    def __post_init__(self) -> None:
        if isinstance(self.inner, Compensated) and not self.wraps_compensated:
            raise SparsifierError(f"{self.name} wraps a sparsifier, not what adds biases to one: {self.inner.label}")
        if self.inner.protocol != "common":
            raise SparsifierError(
                f"{self.name} follows the common protocol, got an inner method of {self.inner.protocol!r}"
            )
        self.target = self.inner.target
        self.sites = tuple(self.sites)
        unknown = [s for s in self.sites if s not in LINEAR_ROLES]
        if unknown or not self.sites:
            raise SparsifierError(
                f"sites must be some of {', '.join(LINEAR_ROLES)}, got {', '.join(unknown) or 'none'}"
            )
        super().__post_init__()

    @property
    def needs(self) -> frozenset[Statistic]:  # type: ignore[override]
        return self.inner.needs

    @property
    def label(self) -> str:
        return f"{self._variant}({self.inner.label})"

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return self.inner.rule(site, statistics, ratio)

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        return self.inner.ratios(calibrated, nominal)

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        plan = self.inner.plan_at(calibrated, nominal)
        calibrated.decoder.check_roles(self.sites)
        unmasked = {site: Rule() for site in calibrated.decoder.sites(self.sites)}
        return replace(plan, rules=unmasked | plan.rules, method=self.label)

    def with_biases(self, plan: Plan, biases: Mapping[Site, Tensor]) -> Plan:
        """`plan` with `biases` [out] added to its rules' own."""
        rules = dict(plan.rules)
        for site, bias in biases.items():
            rule = rules.get(site, Rule())
            rules[site] = replace(rule, bias=bias if rule.bias is None else rule.bias + bias)
        return replace(plan, rules=rules, method=self.label)

    def matched(self, calibrated: CalibratedModel, compensate: Callable[[Plan], Plan], start: float) -> Plan:
        """Move the inner thresholds until the plan that `compensate` made of them measures the target.

        Biases bring the inputs of later layers nearer to the dense model's, and so larger: with the thresholds of
        the bare sparsifier fewer of them would rest, and part of a gain would be bought with bytes.
        """
        plan, measured = allocation.match(
            lambda nominal: compensate(self.plan_at(calibrated, nominal)),
            calibrated.measure,
            self.target,
            start,
        )
        return replace(plan, info=plan.info | {"matched": measured})


def folded_bias(decoder: Decoder, site: Site, alpha: Tensor) -> Tensor:
    """``W alpha`` on the CPU, in fp32 (fp64 for a model in fp64): what activations alpha [in] add to every output."""
    with torch.no_grad():
        weight = decoder.linear(site).weight
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return (weight.to(dtype) @ alpha.to(weight.device).to(dtype)).cpu()
