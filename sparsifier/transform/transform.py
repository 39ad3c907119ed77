"""Describes a transform of a model, with its bytes and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import PlanError
from resting.sparsifier.roles import INPUT_OF
from resting.sparsifier.sites import Site

ORTHOGONAL = 1e-4
"""Largest entry of ``Q^T Q - I`` of a rotation that is taken for one; in float64 a millionth of it."""
TYPES = {"name": str, "folded": bool, "free": bool, "attention": list, "mlp": list}
"""What plan.json holds of a transform."""


@dataclass(frozen=True, eq=False)
class Transform:
    r"""Says how a model is rewritten, so that it computes the same and its matrices read other inputs.

    .. math::
        n = r / rms(r), \qquad W h = W (\gamma \odot n) = (W \, diag(\gamma) \, Q) (Q^T n), \qquad
        W_v' = R_g^T W_v, \quad W_o' = W_o \, blockdiag(R_g)

    for the residual r, the weight gamma of the norm (for Gemma 1 + w), an orthogonal Q, and one orthogonal R_g for
    every head of keys and values. Attention mixes tokens and no channels, so that R_g merges exactly, under grouped
    queries too. Q merges into the matrices on both sides of the residual stream; where it changes on the way from
    embedding to output layer, one dense ``Q^T Q'`` is left over, an adapter, which every token reads.

    Attributes
    ----------
    name : str
        As shown.
    folded : bool
        Whether the weights of the norms before attention and MLP are folded into the matrices that read them: then
        sites see n in place of gamma n.
    rotations : tuple of Tensor [d, d]
        The different Q. They need folded norms: a norm with a weight does not commute with them.
    attention, mlp : tuple of int
        Which of them rotates the input of attention, and of the MLP, block by block; empty without rotations.
    heads : tuple of Tensor [groups, size, size]
        R of every head of keys and values, block by block; empty without.
    free : bool
        Leave adapters out of the bytes that are counted: what the idea would give without its bill.

    Raises
    ------
    PlanError
        If a matrix is not square and orthogonal, or an index is none.
    """

    name: str
    folded: bool = False
    rotations: tuple[Tensor, ...] = ()
    attention: tuple[int, ...] = ()
    mlp: tuple[int, ...] = ()
    heads: tuple[Tensor, ...] = ()
    free: bool = False

    def __post_init__(self) -> None:
        for name in ("rotations", "attention", "mlp", "heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.rotations and not self.folded:
            raise PlanError(f"{self.name} rotates behind norms that are not folded: it must be folded")
        if not self.rotations and (self.attention or self.mlp):
            raise PlanError(f"{self.name} names rotations and has none")
        if len(self.attention) != len(self.mlp):
            raise PlanError(f"{self.name} rotates {len(self.attention)} attentions and {len(self.mlp)} MLPs")
        for index in (*self.attention, *self.mlp):
            if not 0 <= index < len(self.rotations):
                raise PlanError(f"{self.name} has {len(self.rotations)} rotations, and no number {index}")
        for i, rotation in enumerate(self.rotations):
            _check_orthogonal(rotation, f"rotation {i}", 2)
        for i, rotation in enumerate(self.heads):
            _check_orthogonal(rotation, f"the rotation of heads in block {i}", 3)

    def rotation(self, site: Site) -> Tensor | None:
        """Gives Q [d, d] of what `site` reads; None where that is not rotated by one."""
        which = {"attention": self.attention, "mlp": self.mlp}.get(INPUT_OF.get(site.role, ""), ())
        return self.rotations[which[site.block]] if which else None

    @property
    def path(self) -> tuple[int, ...]:
        """Lists the rotations that the residual stream goes through, from the first attention to the last MLP."""
        return tuple(index for pair in zip(self.attention, self.mlp) for index in pair)

    @property
    def adapters(self) -> int:
        """Counts the dense matrices that no weight takes up: one wherever the rotation changes on the way."""
        return sum(here != there for here, there in pairwise(self.path))

    @property
    def extra_elements(self) -> int:
        """Counts the numbers that a token reads beside the weights: those of the adapters."""
        return 0 if self.free or not self.rotations else self.adapters * self.rotations[0].numel()

    def like(self, weight: Tensor) -> Transform:
        """Gives the same transform where `weight` is, in fp32, or in fp64 where that is."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        if not (self.rotations or self.heads):
            return self
        rotations, heads = (tuple(q.to(weight.device, dtype) for q in of) for of in (self.rotations, self.heads))
        return replace(self, rotations=rotations, heads=heads)

    def check(self, decoder: Decoder) -> None:
        """Refuses a model of other shapes.

        Raises
        ------
        PlanError
        """
        for name, given in (("rotations", self.attention), ("rotations of heads", self.heads)):
            if given and len(given) != decoder.blocks:
                raise PlanError(f"{self.name} has {name} for {len(given)} blocks, the model has {decoder.blocks}")
        if not self.rotations:
            return
        for site in decoder.sites():
            width = decoder.projection(site).in_features
            if INPUT_OF[site.role] in ("attention", "mlp") and width != len(self.rotations[0]):
                raise PlanError(f"{self.name} rotates {len(self.rotations[0])} channels, {site} reads {width}")

    def tensors(self) -> dict[str, Tensor]:
        """Gives the matrices by name, as they are saved."""
        named = {f"rotation.{i}": rotation for i, rotation in enumerate(self.rotations)}
        named |= {f"heads.{i}": rotation for i, rotation in enumerate(self.heads)}
        return {name: tensor.detach().cpu().contiguous() for name, tensor in named.items()}

    def meta(self) -> dict[str, Any]:
        """Gives everything else (JSON)."""
        return {
            "name": self.name,
            "folded": self.folded,
            "free": self.free,
            "attention": list(self.attention),
            "mlp": list(self.mlp),
        }

    @classmethod
    def of_stored(cls, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Transform:
        """Makes a transform of what `meta` and `tensors` gave.

        Raises
        ------
        PlanError
            If something is missing, is of another type or is not known.
        """
        for name, kind in TYPES.items():
            if not isinstance(meta.get(name), kind):
                raise PlanError(f"{name} of the transform must be a {kind.__name__}, got {meta.get(name)!r}")
        if unknown := sorted(meta.keys() - TYPES.keys()):
            raise PlanError(f"the transform has a key {unknown[0]!r}; allowed: {', '.join(TYPES)}")
        for index in (*meta["attention"], *meta["mlp"]):
            if type(index) is not int:
                raise PlanError(f"a transform names its rotations by whole numbers, got {index!r}")
        listed: dict[str, list[Tensor]] = {"rotation": [], "heads": []}
        for kind_of, found in listed.items():
            while (tensor := tensors.get(f"{kind_of}.{len(found)}")) is not None:
                found.append(tensor)
        if len(tensors) != sum(map(len, listed.values())):
            known = {f"{kind_of}.{i}" for kind_of, found in listed.items() for i in range(len(found))}
            raise PlanError(f"the transform has a matrix {min(tensors.keys() - known)!r} out of order")
        return cls(rotations=tuple(listed["rotation"]), heads=tuple(listed["heads"]), **meta)


def _check_orthogonal(matrix: Tensor, name: str, dims: int) -> None:
    """Refuses what is no orthogonal matrix, or no stack of them."""
    if matrix.dim() != dims or matrix.shape[-1] != matrix.shape[-2] or not matrix.is_floating_point():
        wanted = "[size, size]" if dims == 2 else "[heads, size, size]"
        raise PlanError(f"{name} must be {wanted} of floating-point numbers, got {list(matrix.shape)} {matrix.dtype}")
    if matrix.is_meta:  # shapes without numbers
        return
    exact = matrix.dtype == torch.float64
    q = matrix if exact else matrix.float()
    off = float((q.mT @ q - torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)).abs().max())
    bound = 1e-6 * ORTHOGONAL if exact else ORTHOGONAL
    if not off <= bound:  # also where it is NaN
        raise PlanError(f"{name} is not orthogonal: Q^T Q is {off:.1e} off the identity; allowed: {bound:.0e}")
