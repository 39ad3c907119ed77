"""Offers rotations that cost no byte: one of the residual stream for all blocks, and one of each head of values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor

from resting.baselines.teal import Teal
from resting.sparsifier import (
    CalibratedModel,
    Original,
    Site,
    SparsifierError,
    Transform,
    Transformed,
)
from resting.sparsifier.transform import eigenbasis, head_bases, random_rotation, stored_like, together
from resting.sparsifier.transform.heads import Heads
from resting.sparsifier.transformed import folded_moments


@dataclass
class Rotated(Transformed, Teal):
    """Masks like TEAL in a rotated basis: the base of the two methods below.

    Parameters
    ----------
    basis : {"moments", "random"}
        The eigenvectors of second moments, or, as a control, an orthogonal matrix drawn at random.
    seed : int
        Of the random one.
    """

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    original: ClassVar[Original | None] = None  # type: ignore[assignment]

    basis: Literal["moments", "random"] = "moments"
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.basis not in ("moments", "random"):
            raise SparsifierError(f"basis must be moments or random, got {self.basis!r}")

    @property
    def has_seed(self) -> bool:
        return self.basis == "random"

    @abstractmethod
    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        """Computes the transform."""


@dataclass
class RotationGlobal(Rotated):
    r"""Rotates the residual stream by one matrix for all blocks, which merges into weights and costs no byte.

    .. math::
        H = \sum_l \frac{E[n_l n_l^T]}{tr \, E[n_l n_l^T]} = Q \Lambda Q^T, \qquad
        y = (W \, diag(\gamma) \, Q) \, S(Q^T n), \qquad S(x)_i = x_i \, 1\{|x_i| > t\}

    over what attention and MLP of all blocks l read behind their norms, with folded gamma. LaRoSA's idea without its
    adapters: since Q is one, embedding, o, down and output layer take it up. Proposed in this project's notes on
    LaRoSA (arXiv 2507.01299), which has one rotation a block.

    Parameters
    ----------
    heads : bool
        Rotate the heads of values as well (`RotationHeads`).
    """

    name: ClassVar[str] = "rotation-global"
    paper: ClassVar[str] = "a proposal of this project, after LaRoSA, arXiv 2507.01299"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "rotation-global-heads": {"heads": True},
        "rotation-global-greedy": {"allocation": "greedy"},
        "rotation-global-random": {"basis": "random"},
    }

    heads: bool = False

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        decoder = calibrated.decoder
        if self.basis == "random":
            rotation = random_rotation(calibrated.model.get_input_embeddings().weight.shape[1], self.seed)
        else:
            moments = folded_moments(calibrated, "attention", "mlp")
            rotation = eigenbasis(together(gram for grams in moments.values() for gram in grams))
        every = (0,) * decoder.blocks
        turned = rotations_of_heads(calibrated, self.basis, self.seed) if self.heads else ()
        return Transform(self.label, True, (stored_like(rotation, calibrated.model),), every, every, turned)


@dataclass
class RotationHeads(Rotated):
    r"""Rotates the input of o, head by head, by matrices that merge into v and o and cost no byte.

    .. math::
        \sum_{h \in g} E[a_h a_h^T] = R_g \Lambda R_g^T, \qquad W_v' = R_g^T W_v, \quad b_v' = R_g^T b_v, \qquad
        W_o' = W_o \, blockdiag(R_{g(h)})

    for the input a_h of o at head h, and the heads h that share the keys and values g. Attention mixes tokens and no
    channels, and so it is exact. Masks are TEAL's. Proposed in this project's notes on LaRoSA (arXiv 2507.01299),
    which leaves o alone.
    """

    name: ClassVar[str] = "rotation-heads"
    paper: ClassVar[str] = "a proposal of this project, after LaRoSA, arXiv 2507.01299"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "rotation-heads-greedy": {"allocation": "greedy"},
        "rotation-heads-random": {"basis": "random"},
    }

    def rewriting(self, calibrated: CalibratedModel) -> Transform:
        return Transform(self.label, heads=rotations_of_heads(calibrated, self.basis, self.seed))


def rotations_of_heads(calibrated: CalibratedModel, basis: str, seed: int) -> tuple[Tensor, ...]:
    """Computes R [groups, size, size] of every block."""
    decoder = calibrated.decoder
    heads = [Heads.of(decoder, block) for block in range(decoder.blocks)]
    if basis == "random":
        drawn = [random_rotation(h.size, seed + block) for block, h in enumerate(heads)]
        found = [one.expand(h.groups, h.size, h.size) for one, h in zip(drawn, heads)]
    else:
        moments = calibrated.grams([Site(block, "o") for block in range(decoder.blocks)])
        found = [head_bases(moments[Site(b, "o")], h.groups, h.size) for b, h in enumerate(heads)]
    return tuple(stored_like(one, calibrated.model) for one in found)
