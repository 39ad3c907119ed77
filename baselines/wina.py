"""Implements the score of WINA (Chen et al., 2025, arXiv 2505.19427), without its rotation of the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from resting.baselines.teal import Teal
from resting.sparsifier import LINEAR_ROLES, Original, Rule, Site, SparsifierError, Statistics, is_wanted

RELEASED = ("k", "gate")
"""Roles whose score has column norms in the authors' code, for the rotated model: their rotations are of k and gate."""


@dataclass
class Wina(Teal):
    r"""Masks inputs by what they do to the output, as far as their column of weights tells.

    .. math:: keep_i = |x_i| \, \|W_{:,i}\|_2 > t

    The authors rotate the model first, so that columns are orthogonal and the score is the exact error of dropping one
    input; they keep a fixed number of channels (`topk`). Here weights stay as they are.

    The paper has the norms at every layer. The authors' released code (microsoft/wina 8153dbf) has them at k and gate,
    and scores the other five by ``|x_i|`` alone: that is ``wina-released``, here without the rotation too.

    Parameters
    ----------
    norms : tuple of str
        Roles whose score has column norms, all seven by default.
    """

    name: ClassVar[str] = "wina"
    paper: ClassVar[str] = "Chen et al. 2025, arXiv 2505.19427"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "wina-greedy": {"allocation": "greedy"},
        "wina-released": {"norms": RELEASED},
        "wina-released-greedy": {"norms": RELEASED, "allocation": "greedy"},
    }
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    norms: tuple[str, ...] = LINEAR_ROLES

    def __post_init__(self) -> None:
        super().__post_init__()
        self.norms = tuple(self.norms)
        if unknown := [role for role in self.norms if role not in LINEAR_ROLES]:
            raise SparsifierError(f"norms must be some of {', '.join(LINEAR_ROLES)}, got {', '.join(unknown)}")

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        return statistics.column_norms(site) if is_wanted(site.role, self.norms) else None

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        norms = self.scale(site, statistics)
        if norms is None:
            return super().rule(site, statistics, ratio)
        return Rule(threshold=statistics[site].score_quantile(ratio), scale=norms)
