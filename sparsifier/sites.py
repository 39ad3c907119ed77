"""Names the places of a decoder where inputs can rest."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

SHARED = "shared"
"""Part of a block's MLP that every token goes through, beside experts."""
EXPERT = "expert"
"""Begins the name of one expert's part, as in ``expert5``."""


class Site(NamedTuple):
    """Names one place of rest: a matrix's input, the activated gate (``act``), or an MLP's neurons (``neurons``).

    Attributes
    ----------
    block : int
        Index of the decoder block, from 0.
    role : str
        What the matrix that reads the input computes (`sparsifier.roles`), or `ACT` or `NEURONS`.
    part : str
        Empty in a block with one MLP; in a mixture of experts `SHARED`, or one expert, as ``expert5``.
    """

    block: int
    role: str
    part: str = ""

    def __str__(self) -> str:
        return f"{self.block}.{self.group}" if not self.is_expert else f"{self.block}.{self.part}.{self.role}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Reads a site as it is written, such as ``"3.down"`` or ``"3.expert5.down"``."""
        block, *part, role = text.split(".")
        return cls(int(block), role, ".".join(part))

    @property
    def is_expert(self) -> bool:
        """Tells whether only those tokens come here that a router sends to one expert."""
        return self.part.startswith(EXPERT)

    @property
    def expert(self) -> int:
        """Gives the number of the expert."""
        return int(self.part.removeprefix(EXPERT))

    @property
    def group(self) -> str:
        """Names it in its block; all experts have one name."""
        part = "experts" if self.is_expert else self.part
        return f"{part}.{self.role}" if part else self.role


class Slot(NamedTuple):
    """Says where a module hangs: ``getattr(parent, attribute)``."""

    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        """Gives the module that hangs there."""
        module = self.parent._modules[self.attribute]  # `getattr` is much slower: a plan has hundreds
        assert module is not None
        return module

    def put(self, module: nn.Module) -> None:
        """Hangs `module` there."""
        self.parent._modules[self.attribute] = module  # and `setattr`
