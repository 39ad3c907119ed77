"""Defines the base of methods that act on a rewritten model."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch import Tensor

from resting.sparsifier.base import Sparsifier
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.roles import INPUT_OF
from resting.sparsifier.sites import Site
from resting.sparsifier.transform import Transform, explicit

T = TypeVar("T")
FOLDED = Transform("folded norms", folded=True)
"""Norms folded into the matrices that read them, and nothing rotated."""


@dataclass
class Transformed(Sparsifier):
    """Rewrites the model, and lets inputs of the rewritten one rest: the base of methods with rotations.

    A subclass says how, by `rewriting`; the rest of it is a method like any other, and sees statistics, weights and
    bytes of the rewritten model. It may derive from another method: ``class TealFolded(Transformed, Teal)``.
    """

    @abstractmethod
    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        """Computes the transform; it is asked once for all targets."""

    def transform(self, calibrated: CalibratedModel) -> Transform:
        """Gives what `rewriting` computed."""
        settings = {key: value for key, value in self.spec().items() if key not in ("target", "topk", "protocol")}
        key = f"transform {json.dumps(settings, sort_keys=True)} {type(self).__qualname__}"
        if key not in calibrated.cached:
            calibrated.cached[key] = self.rewriting(calibrated)
        return calibrated.cached[key]


def on_folded(calibrated: CalibratedModel, look: Callable[[], T]) -> T:
    """Gives what `look` finds while the norms of the model are folded."""
    with explicit(FOLDED, calibrated.model, calibrated.decoder):
        return look()


def folded_moments(calibrated: CalibratedModel, *kinds: str) -> dict[str, list[Tensor]]:
    """Gathers the second moments of what attention and MLP (`kinds`) read in every block, with norms folded.

    Returns
    -------
    dict of list of Tensor [d, d]
        By kind, block by block, in fp64.
    """
    first: dict[tuple[str, int], Site] = {}
    for site in calibrated.decoder.sites():
        if not site.part and INPUT_OF[site.role] in kinds:
            first.setdefault((INPUT_OF[site.role], site.block), site)
    moments = on_folded(calibrated, lambda: calibrated.grams(list(first.values())))
    blocks = range(calibrated.decoder.blocks)
    return {kind: [moments[first[kind, block]] for block in blocks] for kind in kinds}
