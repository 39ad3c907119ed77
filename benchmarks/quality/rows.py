"""Turns what a cell measured into rows of results.csv: one row per number, or per reason why there is none."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

from resting.benchmarks import cache
from resting.benchmarks.cells.cell import COLUMNS, STORED, Cell
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.quality.intervals import Interval
from resting.benchmarks.quality.perplexity import Score

Row = dict[str, Any]


@dataclass
class Rows:
    """Collects the rows of one cell, and the single values behind them.

    Attributes
    ----------
    suite : Suite
    model : str
        The model's name.
    cell : Cell
    rows : list of dict
        With the keys of `COLUMNS` and `STORED`.
    windows, items : dict of str to list of float
        Values by metric: nats a token of every window; metrics of tasks, item by item.
    """

    suite: Suite
    model: str
    cell: Cell
    rows: list[Row] = field(default_factory=list)
    windows: dict[str, list[float]] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)

    def score(self, text: str, score: Score) -> None:
        """Add perplexity and KL on one text, with the values of its windows."""
        self.number(text, f"{text}_perplexity", score.perplexity(), score)
        self.number(text, f"{text}_kl", score.divergence(), score)
        self.windows[f"{text}_nll"] = [rounded(v) for v in score.nll / score.scored_tokens]
        self.windows[f"{text}_kl"] = [rounded(v) for v in score.kl / score.scored_tokens]

    def number(self, text: str, metric: str, value: tuple[float, float], score: Score) -> None:
        """Add one number of a text, given with its standard error."""
        mean, error = value
        self._add(
            text,
            metric,
            byte_sparsity=rounded(score.byte_sparsity),
            bits_read=rounded(score.bits_read),
            value=rounded(mean),
            stderr=_known(error),
            n=score.n,
        )

    def task(
        self, task: str, metric: str, items: list[float], value: tuple[float, float], gap: Interval, sparsity: float
    ) -> None:
        """Add one metric of a task: its value and standard error, and the paired difference to dense."""
        name = f"{task}/{metric}"
        self._add(
            task,
            name,
            byte_sparsity=rounded(sparsity),
            value=rounded(value[0]),
            stderr=_known(value[1]),
            n=len(items),
            window=None,
            difference=_known(gap.value),
            difference_low=_known(gap.low),
            difference_high=_known(gap.high),
        )
        self.items[name] = [rounded(v) for v in items]

    def no_number(self, text: str, metric: str, reason: str) -> None:
        """Add the row that says why one number of a text is none."""
        self._add(text, metric, reason=reason)

    def no_text(self, text: str, reason: str) -> None:
        """Add rows that say why a text has no numbers."""
        for metric in ("perplexity", "kl"):
            self._add(text, f"{text}_{metric}", reason=reason)

    def no_task(self, task: str, reason: str) -> None:
        """Add the row that says why a task has no numbers."""
        self._add(task, f"{task}/acc", reason=reason)

    def nothing(self, reason: str) -> None:
        """Add a row for every text and task of the suite that says why the cell has no number."""
        for text in self.suite.evaluation.texts:
            self.no_text(text, reason)
        for task in self.suite.task_names:
            self.no_task(task, reason)

    def note(self, reason: str) -> None:
        """Write `reason` into every row, beside its number; one without a number says already why."""
        for row in self.rows:
            row["reason"] = row["reason"] or reason

    def _add(self, dataset: str, metric: str, **values: Any) -> None:
        common = {
            "suite": self.suite.name,
            "model": self.model,
            "method": self.cell.label,
            "target": self.cell.target,
            "seed": self.cell.seed,
            "metric": metric,
            "dataset": dataset,
            "tokens": str(self.cell.policy),
            "dtype": self.suite.dtype,
            "window": self.suite.evaluation.window,
        }
        if "reason" in values:  # rows are the same wherever they are measured
            values["reason"] = values["reason"].replace(f"{cache.root()}{os.sep}", f"$RESTING_CACHE{os.sep}")
        self.rows.append(dict.fromkeys([*COLUMNS, *STORED]) | common | values)


def rounded(value: float) -> float:
    """Round to the seven digits that rows keep."""
    return float(f"{value:.7g}")


def _known(value: float) -> float | None:
    return rounded(value) if math.isfinite(value) else None
