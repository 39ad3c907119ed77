"""Implements TEAL, training-free activation sparsity (Liu et al., 2024, arXiv 2408.14690)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from resting.sparsifier import (
    LINEAR_ROLES,
    BlockGreedy,
    CalibratedModel,
    GreedySearch,
    LastFraction,
    Original,
    Rule,
    Site,
    Sparsifier,
    SparsifierError,
    Statistics,
)


@dataclass
class Teal(Sparsifier):
    r"""Masks the input of every linear layer by a magnitude threshold.

    .. math:: keep_i = |x_i| > t, \qquad t = F^{-1}_{|x|}(s)

    with F the empirical distribution of |x| over calibration tokens and channels, one scalar per tensor (section 4).
    The authors take the quantile 0.5 + s/2 of x and assume it symmetric around 0; the quantile of |x| needs no
    such assumption.

    Parameters
    ----------
    allocation : {"uniform", "greedy"}
        The same ratio s everywhere, or in every block those ratios that the block's own output feels least
        (algorithm 1). Weights of the projections are those of the model's shapes; the authors' code has a table of
        them, which is right for Llama-3-8B and the 70B models, and wrong for Mistral-7B and for Llama-2-7B and 13B,
        whose queries are not grouped.
    modules : tuple of str
        Roles whose inputs are masked, all seven by default.
    step : float
        Share of a block's bytes that rests with each greedy step: about the authors' 0.05 of q. Coarser steps lose
        much where queries are grouped (docs/protocol.md): k and v then rest in one or two of them.
    windows, window : int
        Calibration windows whose dense block inputs the greedy search runs on, and their first tokens that it uses;
        the authors have 10 of 2,048.
    """

    name: ClassVar[str] = "teal"
    paper: ClassVar[str] = "Liu et al. 2024, arXiv 2408.14690"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"teal-greedy": {"allocation": "greedy"}}
    original: ClassVar[Original] = Original(
        windows=10,
        window=2048,
        tokens=LastFraction(0.5),
        text="Alpaca (tatsu-lab/alpaca)",
        source="released code, FasterDecoding/TEAL 5baaec8",
    )

    allocation: Literal["uniform", "greedy"] = "uniform"
    modules: tuple[str, ...] = LINEAR_ROLES
    step: float = 0.005
    windows: int = 2
    window: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation not in ("uniform", "greedy"):
            raise SparsifierError(f"allocation must be uniform or greedy, got {self.allocation!r}")
        self.modules = tuple(self.modules)
        if unknown := [role for role in self.modules if role not in LINEAR_ROLES] or ["none"] * (not self.modules):
            raise SparsifierError(f"modules must be some of {', '.join(LINEAR_ROLES)}, got {', '.join(unknown)}")
        if not 0.0 < self.step <= 0.25:
            raise SparsifierError(f"step must be above 0 and at most 0.25, got {self.step}")
        for name, lowest in (("windows", 1), ("window", 2)):
            if getattr(self, name) < lowest:
                raise SparsifierError(f"{name} must be at least {lowest}, got {getattr(self, name)}")

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.modules

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule(threshold=statistics[site].quantile(ratio))

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        return (
            super().ratios(calibrated, nominal)
            if self.allocation == "uniform"
            else self._greedy(calibrated).ratios(nominal)
        )

    def _greedy(self, calibrated: CalibratedModel) -> BlockGreedy:
        size = (self.step, self.windows, self.window)
        if self.protocol == "original":  # the last half of a window is sparse, errors are measured at the last quarter
            search = GreedySearch(*size, LastFraction(0.5), measured=0.25)
        else:
            search = GreedySearch(*size, calibrated.calibration.statistics_policy)
        # Whatever decides on the rules, parameters of a subclass too; not the target, since all targets share paths.
        name = json.dumps({key: value for key, value in self.spec().items() if key != "target"}, sort_keys=True)
        key = f"greedy {name} {self.roles} {search}"
        if key not in calibrated.cached:
            statistics = self.statistics(calibrated)
            calibrated.cached[key] = BlockGreedy(
                calibrated, lambda site, ratio: self.rule_or_topk(site, statistics, ratio), self.roles, search, name
            )
        return calibrated.cached[key]
