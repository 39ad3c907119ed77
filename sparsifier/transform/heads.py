"""Rotates the heads of values, and the matrix that reads what attention makes of them."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.sites import Site


@dataclass(frozen=True)
class Heads:
    """Holds how many heads attention has.

    Attributes
    ----------
    count : int
        Heads of queries; `count / groups` that lie beside each other share one of keys and values.
    groups : int
        Heads of keys and values.
    size : int
        Channels of a head.
    """

    count: int
    groups: int
    size: int

    @classmethod
    def of(cls, decoder: Decoder, block: int) -> Heads:
        """Reads the heads of `block` off the shapes of v and o, and the size of a head.

        Raises
        ------
        UnsupportedModelError
            If values are no matrix of their own, or the size of a head is not known.
        """
        sites = [Site(block, role) for role in ("v", "o")]
        if any(site not in decoder.slots for site in sites):
            have = ", ".join(role for part, role in decoder.found[block].projections if not part)
            raise UnsupportedModelError(f"block {block} has no v of its own to rotate heads by; it has {have}")
        v, o = map(decoder.projection, sites)
        size = getattr(decoder.slots[sites[1]].parent, "head_dim", None)
        if not isinstance(size, int) or size < 1 or v.out_features % size or o.in_features % v.out_features:
            raise UnsupportedModelError(
                f"block {block} has {v.out_features} values and {o.in_features} inputs of o, which are no heads of "
                f"{size} channels"
            )
        return cls(o.in_features // size, v.out_features // size, size)

    def of_values(self, v: Tensor, turn: Tensor) -> Tensor:
        """Computes ``R^T v`` head by head, of a matrix [out, in] or a bias [out] with `turn` [groups, size, size]."""
        return (turn.mT @ v.reshape(self.groups, self.size, -1)).reshape(v.shape)

    def of_outputs(self, o: Tensor, turn: Tensor) -> Tensor:
        """Computes ``W_o blockdiag(R)``, of a matrix [out, heads * size]."""
        every = turn.repeat_interleave(self.count // self.groups, 0)
        return (o.reshape(len(o), self.count, 1, self.size) @ every).reshape(o.shape)
