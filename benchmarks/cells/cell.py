"""Describes a cell (one method at one target and seed on one model), and holds what it measured."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resting.benchmarks.cells.suite import MethodConfig
from resting.sparsifier import Sparsifier, TokenPolicy

COLUMNS = [
    "suite",
    "model",
    "weights",
    "method",
    "target",
    "byte_sparsity",
    "seed",
    "metric",
    "value",
    "stderr",
    "n",
    "dataset",
    "tokens",
    "dtype",
    "window",
    "reason",
    "difference",
    "difference_low",
    "difference_high",
]
"""Of a row of results.csv: one row per number."""
STORED = ["weight_format", "bits_a_weight", "bits_read"]
"""Further columns where a suite has weights in several formats, or in another than they came in: the format, what it
takes a weight, and what a sparse token reads over the weights of all matrices of the blocks (`Meter.bits_read`)."""


@dataclass(frozen=True)
class Cell:
    """Describes what is to be measured.

    Attributes
    ----------
    config : MethodConfig
        The suite's entry.
    sparsifier : Sparsifier
    seed : int
    policy : TokenPolicy
        Decides which tokens of what is scored are sparse.
    """

    config: MethodConfig
    sparsifier: Sparsifier
    seed: int
    policy: TokenPolicy

    @property
    def label(self) -> str:
        return self.config.label or self.sparsifier.label

    @property
    def target(self) -> float:
        return self.sparsifier.target


@dataclass
class Result:
    """Holds what a cell measured.

    Attributes
    ----------
    status : str
        ``done``; ``skipped`` where a method cannot give a number; ``diverged`` where a number is not finite;
        ``missing`` where data were not to be had, ``failed`` and ``out-of-memory``, which are tried again at the next
        run. The reasons are in the rows, of failures in `info`.
    rows : list of dict
        One a metric, in the columns of results.csv.
    windows : dict
        Per-window sums behind a metric, for paired differences.
    items : dict
        Of tasks: metrics item by item.
    seconds : float
    """

    status: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    windows: dict[str, list[float]] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    measured_on: dict[str, Any] = field(default_factory=dict)
