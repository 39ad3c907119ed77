"""Implements CHESS, channel-wise thresholding and selective sparsification (He et al., 2024, arXiv 2409.01366)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from resting.sparsifier import (
    ACT,
    AllButFirst,
    Original,
    Rule,
    Site,
    Sparsifier,
    SparsifierError,
    Statistic,
    Statistics,
)


@dataclass
class Chess(Sparsifier):
    r"""Masks the activated gate by its product with what calibration expects it to be multiplied with.

    .. math::
        importance_i = |v_i| \, u_i, \qquad u_i = \sqrt{E[(W_{up} x)_i^2]} \quad \text{or} \quad E|(W_{up} x)_i|,
        \qquad keep_i = importance_i > T, \qquad T = F^{-1}_{importance}(k)

    The sum of squared importances of what rests is the error of down's input (section 3.2), which gives the root mean
    square; the authors' later code has the mean magnitude. With a constant u it is CATS, bit for bit: u is divided by
    its largest entry.

    Parameters
    ----------
    attention : bool
        Selective sparsification (section 3.3): magnitude thresholds at the inputs of q and o too.
    importance : {"rms", "mean"}
        Which u.
    """

    name: ClassVar[str] = "chess"
    paper: ClassVar[str] = "He et al. 2024, arXiv 2409.01366"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HISTOGRAM, Statistic.UP})
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"chess-attention": {"attention": True}}
    original: ClassVar[Original] = Original(
        windows=64,
        window=2048,
        tokens=AllButFirst(0),
        text="C4 (allenai/c4)",
        source="first author's released code, ZeonfaiHo/CHESS 49802b1",
    )

    attention: bool = False
    importance: Literal["rms", "mean"] = "rms"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.importance not in ("rms", "mean"):
            raise SparsifierError(f"importance must be rms or mean, got {self.importance!r}")

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        return (ACT, "q", "o") if self.attention else (ACT,)

    def scale(self, site: Site, statistics: Statistics) -> Tensor | None:
        if site.role != ACT:
            return None
        up = statistics[site].up_moments()
        u = up.root_mean_square if self.importance == "rms" else up.mean_magnitude
        return (u / u.max().clamp_min(torch.finfo(u.dtype).tiny)).float()

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        if site.role != ACT:
            return Rule(threshold=statistics[site].quantile(ratio))
        u = self.scale(site, statistics)
        return Rule(threshold=statistics[site].score_quantile(ratio), scale=1.0 if u is None else u)
