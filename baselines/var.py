"""Implements the variance correction of studies of N:M sparsity of activations (arXiv 2509.22166) over TEAL's masks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from resting.baselines.teal import Teal
from resting.sparsifier import Original, Rule, Site, Statistics


@dataclass
class Var(Teal):
    r"""Masks inputs by a magnitude threshold, and gives what is kept the variance that the token had.

    .. math::
        keep_i = |x_i| > t, \qquad
        \hat{x} = (x \odot keep) \sqrt{\frac{\mathrm{Var}\, x}{\mathrm{Var}\, (x \odot keep)}}, \qquad y = W \hat{x}

    Variances are over the channels of one token, before its mask and after it, resting channels counting as zeros. It
    reads no byte more: the variance of x is known before the mask.

    Source: arXiv 2509.22166 (ACL 2026 industry), which has it for N:M patterns of inputs; formula second hand, text and
    code not read. Masks are TEAL's.
    """

    name: ClassVar[str] = "var"
    paper: ClassVar[str] = "arXiv 2509.22166, ACL 2026 industry track; formula second hand"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        return replace(super().rule(site, statistics, ratio), rescale=True)
