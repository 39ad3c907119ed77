"""Leaves the model as it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from resting.sparsifier import Rule, Site, Sparsifier, SparsifierError, Statistic, Statistics


@dataclass
class Dense(Sparsifier):
    """Lets no input rest: it is the reference of every difference in the tables."""

    name: ClassVar[str] = "dense"
    roles: ClassVar[tuple[str, ...]] = ()
    needs: ClassVar[frozenset[Statistic]] = frozenset()

    target: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target != 0.0:
            raise SparsifierError(f"dense has no sparsity: target must be 0, got {self.target}")

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return Rule()
