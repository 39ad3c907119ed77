"""Defines the bases of methods that act on a rewritten model, and what they need to find a rewriting."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeVar

from torch import Tensor

from resting.sparsifier.allocation import coverage
from resting.sparsifier.base import Sparsifier
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.errors import SparsifierError, TargetUnreachableError
from resting.sparsifier.plan import Plan
from resting.sparsifier.roles import INPUT_OF
from resting.sparsifier.sites import Site
from resting.sparsifier.transform import Transform, explicit, head_bases, random_rotation
from resting.sparsifier.transform.heads import Heads

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
        """Gives what `rewriting` computed, where the model is: in fp32, or in fp64 where the model is."""
        settings = {key: value for key, value in self.spec().items() if key not in ("target", "topk", "protocol")}
        key = f"transform {json.dumps(settings, sort_keys=True)} {type(self).__module__}.{type(self).__qualname__}"
        if key not in calibrated.cached:
            calibrated.cached[key] = self.rewriting(calibrated).like(next(calibrated.model.parameters()))
        return calibrated.cached[key]

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        """Fits as other methods do, and refuses targets that the bytes of adapters put out of reach."""
        added = 0 if calibrated.transform is None else calibrated.transform.extra_elements
        if added and self.protocol == "common":
            decoder = calibrated.decoder
            covered = sum(coverage(decoder, site) for site in decoder.sites(self.roles))
            if self.target > (ceiling := (covered - added) / decoder.elements):
                raise TargetUnreachableError(
                    f"byte sparsity {self.target:g} is above this method's ceiling of {ceiling:.3f} on this model"
                )
        return super().fit_calibrated(calibrated)


@dataclass
class Rotated(Transformed):
    """Rewrites the model by rotations: a `Transformed` whose matrices may be drawn at random, as a control.

    Parameters
    ----------
    basis : {"fitted", "random"}
        What the method says, or orthogonal matrices drawn at random.
    seed : int
        Of the random ones.
    """

    basis: Literal["fitted", "random"] = field(default="fitted", kw_only=True)
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis not in ("fitted", "random"):
            raise SparsifierError(f"basis must be fitted or random, got {self.basis!r}")

    @property
    def has_seed(self) -> bool:
        return self.basis == "random"

    def bases(self, calibrated: CalibratedModel, count: int, find: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Gives the `count` matrices [d, d] of the residual stream that `find` computes, or random ones."""
        if self.basis == "fitted":
            return find()
        width = calibrated.model.get_input_embeddings().weight.shape[1]
        return [random_rotation(width, self.seed * count + i) for i in range(count)]

    def bases_of_heads(self, calibrated: CalibratedModel) -> tuple[Tensor, ...]:
        """Gives a matrix for every head of values, [groups, size, size] block by block.

        They are the eigenvectors of the second moment of what o reads, summed over the heads that share values.
        """
        decoder = calibrated.decoder
        heads = [Heads.of(decoder, block) for block in range(decoder.blocks)]
        if self.basis == "fitted":
            moments = calibrated.grams([Site(block, "o") for block in range(decoder.blocks)])
            return tuple(head_bases(moments[Site(b, "o")], h.groups, h.size) for b, h in enumerate(heads))
        drawn = [random_rotation(h.size, self.seed * len(heads) + block) for block, h in enumerate(heads)]
        return tuple(one.expand(h.groups, h.size, h.size) for one, h in zip(drawn, heads))


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
