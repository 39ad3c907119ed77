"""Reads figures of the literature, which reports put beside measured ones."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache as memoise
from importlib import resources
from typing import Any

FILE = "published.toml"
TRUST = {
    "P": "read in the paper",
    "C": "read in released code or artefacts",
    "A": "in the abstract or README",
    "S": "second hand",
    "D": "derived from shapes",
}
"""What the letters of a figure's trust mean."""


@dataclass(frozen=True)
class Figure:
    """Holds one published number.

    Attributes
    ----------
    model, method, metric : str
    sparsity : float
        As the paper says it.
    value : float
    """

    model: str
    method: str
    metric: str
    sparsity: float
    value: float


@dataclass(frozen=True)
class PublishedTable:
    """Holds one table of a paper, as far as it is known.

    Attributes
    ----------
    title, about, source : str
    trust : str
        One of `TRUST`.
    figures : list of Figure
    """

    title: str
    about: str
    source: str
    trust: str
    figures: list[Figure]


@memoise
def tables() -> dict[str, PublishedTable]:
    """Read all tables of ``assets/published.toml``, by name."""
    text = resources.files("resting.benchmarks.assets").joinpath(FILE).read_text(encoding="utf-8")
    return {name: _table(entry) for name, entry in tomllib.loads(text)["tables"].items()}


def _table(entry: dict[str, Any]) -> PublishedTable:
    figures = [Figure(metric=entry["metric"], **figure) for figure in entry["figures"]]
    about = " ".join(entry["about"].split())
    return PublishedTable(entry["title"], about, entry["source"], entry["trust"], figures)
