"""The bench a sparsifier is fitted on: a model, its calibration text, and what they already gave."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparsifier import fingerprint
from sparsifier.accounting import Meter
from sparsifier.calibration import Calibration
from sparsifier.logits import final_hidden
from sparsifier.plan import Plan
from sparsifier.sites import Decoder
from sparsifier.statistics import Statistic, Statistics

if TYPE_CHECKING:
    from sparsifier.sparsifier import Sparsifier

Report = Callable[[str, int, int, str], None]
"""Called with a stage, the steps done, the steps in all, and a note."""


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """The report that says nothing."""


class Fitting:
    """Shares statistics, teacher states and fitted plans between the methods and targets of one model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense; it is left as it was.
    calibration : Calibration
    report : callable, optional
        Told of progress.
    folder : Path, optional
        Where training keeps its checkpoints, so that a killed run continues; without it nothing is written.
    """

    def __init__(
        self, model: Any, calibration: Calibration, report: Report = silent, folder: Path | None = None
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.report = report
        self.folder = folder
        self.decoder = Decoder.of(model)
        self.shared: dict[str, Any] = {}
        """Whatever methods want to share, by a key of theirs (SPON: the teacher's hidden states)."""
        self._statistics: Statistics | None = None
        self._gathered: frozenset[Statistic] = frozenset()
        self._plans: dict[str, Plan] = {}

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def statistics(self, needs: frozenset[Statistic]) -> Statistics:
        """The dense model's statistics, gathered on the first call that needs them."""
        if self._statistics is None or not needs <= self._gathered:
            self._gathered |= needs
            self._statistics = Statistics.collect(
                self.model,
                self.calibration,
                self._gathered,
                lambda i, n: self.report("statistics", i, n, "windows"),
            )
        return self._statistics

    def plan(self, sparsifier: Sparsifier) -> Plan:
        """The fitted plan of `sparsifier`, remembered."""
        key = json.dumps(sparsifier.spec(), sort_keys=True)
        if key not in self._plans:
            self._plans[key] = sparsifier.fit_on(self)
        return self._plans[key]

    @torch.no_grad()
    def measure(self, plan: Plan) -> float:
        """Byte sparsity of `plan` on the matching windows, run sparse under the calibration's token policy."""
        meter = Meter()
        windows = self.calibration.windows if self.calibration.matching is None else self.calibration.matching
        with plan.applied(self.model, self.calibration.policy(windows), meter):
            for ids, mask in self.calibration.matching_batches():
                final_hidden(self.model, ids.to(self.device), None if mask is None else mask.to(self.device))
        return meter.byte_sparsity()

    def new_plan(self, sparsifier: Sparsifier, rules: dict, nominal: float, info: dict | None = None) -> Plan:
        """A plan for this model and calibration text."""
        return Plan(
            rules=rules,
            method=sparsifier.label,
            target=sparsifier.target,
            nominal=nominal,
            model=fingerprint.of_model(self.model),
            calibration=self.calibration.digest,
            info=info or {},
        )
