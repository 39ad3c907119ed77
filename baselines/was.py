"""Implements WAS, weight-aware activation sparsity (EMNLP 2025, main 57), with a line in depth for its search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from resting.baselines.teal import Teal
from resting.sparsifier import (
    BlockGreedy,
    CalibratedModel,
    Meter,
    Original,
    Plan,
    Rule,
    Site,
    SparsifierError,
    Statistics,
    in_blocks,
    mean_nll,
    slope,
)


@dataclass
class Was(Teal):
    r"""Masks inputs by magnitude times the L1 norm of their column of weights, deeper blocks more than others.

    .. math::
        keep_i = |x_i| \, \|W_{:,i}\|_1^{power} > t, \qquad
        s_l = r + a \left( \frac{2 l}{L - 1} - 1 \right)

    t is the quantile of the score over tokens and channels, s_l the byte sparsity of block l of L. ``was-greedy`` has
    TEAL's greedy ratios inside of a block, as the authors; ``power = 0`` and ``rise = 0`` is TEAL.

    The authors search non-decreasing s_l in ``r -+ .05`` by 50 trials of a tree-structured Parzen estimator, for the
    least perplexity on WikiText-2, whose split they do not name. Here s_l is a line, and its rise a is chosen among
    `rises` by the loss on calibration windows that statistics have not seen (`search_windows`, from the end of the
    text), never on text that is reported. Every candidate is moved to the bytes of the first before it is compared, and
    the chosen one is matched to the target again.

    Source: the paper, read in full; its code (HITSZ-Miao-Group/WAS) was not seen. The line is this project's.

    Parameters
    ----------
    rise : float, optional
        a, in [-1, 1]; searched where None.
    rises : tuple of float
        What is tried, in [-1, 1].
    power : float
        Of the norms, at least 0.
    search_windows : int
        Calibration windows that a rise is judged on.
    """

    name: ClassVar[str] = "was"
    paper: ClassVar[str] = "WAS, EMNLP 2025 main 57; baselines/was.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"was-greedy": {"allocation": "greedy"}}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    rise: float | None = None
    rises: tuple[float, ...] = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05)
    power: float = 1.0
    search_windows: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self.rises = tuple(self.rises)
        if not self.rises:
            raise SparsifierError("rises must hold at least one number, got none")
        for rise in (*self.rises, *(() if self.rise is None else (self.rise,))):
            if not -1.0 <= rise <= 1.0:
                raise SparsifierError(f"a rise must be in [-1, 1], got {rise}")
        if not 0.0 <= self.power < float("inf"):
            raise SparsifierError(f"power must be at least 0 and finite, got {self.power}")
        if self.search_windows < 1:
            raise SparsifierError(f"search_windows must be at least 1, got {self.search_windows}")

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        if self.power == 0.0:
            return None
        return statistics.weight(site).float().abs().sum(0).pow(self.power).cpu()

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        scale = self.scale(site, statistics)
        if scale is None:
            return super().rule(site, statistics, ratio)
        return Rule(threshold=statistics[site].score_quantile(ratio), scale=scale)

    def ratios(self, calibrated: CalibratedModel, nominal: float) -> dict[Site, float]:
        rise = self._chosen(calibrated)[0] if self.rise is None else self.rise
        targets = slope(calibrated.decoder, nominal, rise)
        if self.allocation == "greedy":
            return self._greedy(calibrated).ratios(targets)
        return in_blocks(calibrated.decoder, self.roles, targets)

    def _greedy(self, calibrated: CalibratedModel) -> BlockGreedy:
        # The paths of blocks do not depend on how much each of them is asked for.
        return super(Was, replace(self, rise=0.0, rises=(0.0,), search_windows=1))._greedy(calibrated)

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        plan = super().fit_calibrated(calibrated)
        if self.rise is not None:
            return plan
        rise, losses, apart = self._chosen(calibrated)
        found = {"rise": rise, "rise_losses": {f"{at:g}": loss for at, loss in losses.items()}}
        return replace(plan, info=plan.info | found | {"rise_text_apart_from_statistics": apart})

    def _chosen(self, calibrated: CalibratedModel) -> tuple[float, dict[float, float], bool]:
        """Searches the rise, once for a target: also for the plans that a method which wraps this one asks for."""
        if self.target == 0.0 or len(self.rises) == 1:
            return self.rises[0], {}, True
        # Wherever bytes are matched, the search begins under one policy, whichever of them asks first.
        policy = calibrated.calibration.statistics_policy
        key = f"rise {json.dumps(self.spec(), sort_keys=True)} {policy}"
        if key not in calibrated.cached:
            losses, apart = self._search(calibrated.under(policy))
            calibrated.cached[key] = min(losses, key=lambda rise: losses[rise]), losses, apart
        return calibrated.cached[key]

    def _search(self, calibrated: CalibratedModel) -> tuple[dict[float, float], bool]:
        """Measures the loss at every rise, at one number of bytes, and tells whether its windows gave no statistics."""
        calibration = calibrated.calibration
        windows = calibration.windows[-self.search_windows :]
        apart = len(calibration.windows) - len(windows) >= calibration.statistics_windows
        tokens = calibration.statistics_policy_for(windows)

        def measured(rise: float, nominal: float) -> tuple[float, float]:
            meter, plan = Meter(), replace(self, rise=rise).plan_at(calibrated, nominal)
            with plan.applied(calibrated.model, tokens, meter):
                loss = mean_nll(calibrated.model, windows, calibration.batch_size)
            return loss, meter.byte_sparsity()

        start = replace(self, rise=self.rises[0]).plan_for(calibrated).nominal
        losses: dict[float, float] = {}
        wanted = 0.0
        for number, rise in enumerate(self.rises, 1):
            losses[rise], bytes_unread = measured(rise, start)
            wanted = bytes_unread if number == 1 else wanted
            if abs(bytes_unread - wanted) > 5e-4:
                nominal = min(0.999, max(0.0, start + (wanted - bytes_unread) / 1.15))
                losses[rise], _ = measured(rise, nominal)
            calibrated.on_progress("slope", number, len(self.rises), f"loss {losses[rise]:.4f}")
        return losses, apart
