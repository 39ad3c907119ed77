"""Implements R-Sparse, rank-aware activation sparsity (Zhang et al., 2025, arXiv 2504.19449)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import Tensor

from resting.sparsifier import (
    CalibratedModel,
    Evolution,
    LastFraction,
    Original,
    Plan,
    Rule,
    Site,
    Sparsifier,
    SparsifierError,
    Statistics,
    mean_nll,
)


@dataclass
class RSparse(Sparsifier):
    r"""Keeps the channels of the largest contribution and puts a low-rank product in the place of the others.

    .. math::
        keep_i = |x_i| \, \|W_{:,i}\|_2 > t, \qquad
        y = W (x \odot keep) + A B (x - x \odot keep) = A B x + (W - A B)(x \odot keep)

    with A B the best approximation of W by rank r. A layer of shape [m, n] may read a share C of its bytes (one minus
    the ratio), of which a share rho goes to channels: ``C rho n`` of them are kept, and r = (C m n - kept m) / (m + n),
    from the true shapes (the authors' code gives k and v the rank of a square matrix under grouped queries). As in
    their code the low-rank factors are charged to the budget of their layer. At rho = 1 nothing is
    low-rank and the score is |x_i|, as in their code: that is TEAL.

    Parameters
    ----------
    rho : float, or mapping of site names to floats
        In [0, 1]; 0.95 is said to be what the authors found best without search (second hand).
    search : bool
        Search for a rho of every layer by evolution, from `rho` and from 1, for the least perplexity on calibration
        windows at the budget that the uniform `rho` needs for the target. Measured bytes of a candidate may drift;
        the result is matched again.
    population, generations, mutation, seed
        See `sparsifier.allocation.Evolution`; the authors are said to have 32 and 5 (second hand).
    group : int
        Blocks that are searched together.
    fitness_windows : int
        Calibration windows a candidate is judged on, from the end of the text.
    svd : {"exact", "randomised"}
    """

    name: ClassVar[str] = "rsparse"
    paper: ClassVar[str] = "Zhang et al. 2025, arXiv 2504.19449"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"rsparse-search": {"search": True}}
    original: ClassVar[Original] = Original(
        windows=1,
        window=512,
        tokens=LastFraction(0.1, round_up=True),
        text="WikiText-2 train",
        source="released code, VITA-Group/R-Sparse 59e9a8e",
    )

    rho: float | dict[str, float] = 0.95
    search: bool = False
    population: int = 32
    generations: int = 5
    mutation: float = 0.1
    group: int = 4
    fitness_windows: int = 4
    svd: Literal["exact", "randomised"] = "exact"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for site, rho in self._rhos().items():
            if not 0.0 <= rho <= 1.0:
                raise SparsifierError(f"rho must be in [0, 1], got {rho}{f' at {site}' if site else ''}")
        if self.search and not isinstance(self.rho, float | int):
            raise SparsifierError("the search starts from one rho for all layers, got one per site")
        for name in ("group", "fitness_windows"):
            if getattr(self, name) < 1:
                raise SparsifierError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.svd not in ("exact", "randomised"):
            raise SparsifierError(f"svd must be exact or randomised, got {self.svd!r}")
        self._evolution = Evolution(self.population, self.generations, self.mutation, self.seed)

    @property
    def has_seed(self) -> bool:
        return self.search  # without a search nothing is drawn

    def _rhos(self) -> dict[str, float]:
        return dict(self.rho) if isinstance(self.rho, Mapping) else {"": self.rho}

    def rho_at(self, site: Site) -> float:
        """Gives the share of the budget of `site` that goes to channels."""
        if not isinstance(self.rho, Mapping):
            return self.rho
        if str(site) not in self.rho:
            raise SparsifierError(f"rho has no entry for site {site}; it has {', '.join(self.rho)}")
        return self.rho[str(site)]

    def masked_share(self, site: Site, ratio: float) -> float:
        return 1.0 - (1.0 - ratio) * self.rho_at(site)

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        return None if set(self._rhos().values()) == {1.0} else statistics.column_norms(site)

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        if ratio == 0.0:
            return Rule()
        if self.rho_at(site) == 1.0:
            return Rule(threshold=statistics[site].quantile(ratio))
        out, inputs = statistics.weight(site).shape
        rank = low_rank_budget(out, inputs, density=1.0 - ratio, rho=self.rho_at(site))
        return Rule(
            threshold=statistics[site].score_quantile(self.masked_share(site, ratio)),
            scale=statistics.column_norms(site),
            low_rank=statistics.low_rank(site, rank, self.svd),
        )

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        if not self.search:
            return super().fit_calibrated(calibrated)
        start = replace(self, search=False).plan_for(calibrated)
        rho, losses = self._search(calibrated, start)
        plan = replace(self, search=False, rho=rho).fit_calibrated(calibrated)
        found = {"rho": rho, "losses": losses}
        return replace(plan, method=self.label, info=plan.info | found)

    def _search(self, calibrated: CalibratedModel, start: Plan) -> tuple[dict[str, float], list[float]]:
        sites = calibrated.decoder.sites(self.roles)
        statistics = replace(self, search=False).statistics(calibrated)
        ratios = self.ratios(calibrated, start.nominal)
        rules: dict[tuple[Site, float], Rule] = {}
        windows = calibrated.calibration.windows[-self.fitness_windows :]
        tokens = calibrated.calibration.statistics_policy_for(windows)

        def rule(site: Site, rho: float) -> Rule:
            if (site, rho) not in rules:
                if len(rules) > 16 * len(sites):
                    rules.clear()
                one = replace(self, search=False, rho=rho)
                rules[site, rho] = one.rule_or_topk(site, statistics, ratios[site])
            return rules[site, rho]

        def fitness(genome: list[float]) -> float:
            plan = replace(start, rules={site: rule(site, rho) for site, rho in zip(sites, genome)})
            with plan.applied(calibrated.model, tokens):
                return mean_nll(calibrated.model, windows, calibrated.calibration.batch_size)

        founders = [[float(self.rho)] * len(sites), [1.0] * len(sites)]  # type: ignore[arg-type]
        groups = [
            [i for i, site in enumerate(sites) if first <= site.block < first + self.group]
            for first in range(0, calibrated.decoder.blocks, self.group)
        ]
        known = [self.spec(), start.model, calibrated.setting, start.calibration, start.nominal]
        identity = json.dumps(known, sort_keys=True)
        name = f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
        file = None if calibrated.folder is None else calibrated.folder / "evolution" / name
        genome, losses = self._evolution.search(
            founders,
            groups,
            fitness,
            file,
            calibrated.on_progress,
        )
        return {str(site): rho for site, rho in zip(sites, genome)}, losses


def low_rank_budget(out: int, inputs: int, density: float, rho: float) -> int:
    """Computes the rank that the budget has left for the low-rank part after the kept channels, at least 1.

    Parameters
    ----------
    out, inputs : int
        Shape of the weight.
    density : float
        Share of the weight's bytes that may be read.
    rho : float
        Share of those that goes to kept channels.
    """
    kept = math.floor(inputs * density * rho)
    rank = math.floor((out * inputs * density - kept * out) / (out + inputs))
    return min(max(1, rank), out, inputs)
