"""Finds the places of a decoder where inputs can rest, by role and never by model class."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import nn

from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.matrices import held, matrices

LINEAR_ROLES = ("q", "k", "v", "o", "gate", "up", "down")
ACT = "act"
"""The activated gate: its mask lets the rows of ``up`` and the columns of ``down`` rest together."""

INPUT_OF = {
    "q": "attention",
    "k": "attention",
    "v": "attention",
    "o": "o",
    "gate": "mlp",
    "up": "mlp",
    "down": "down",
}
"""Sites with the same value read the same tensor."""

NAMES = {
    "q": ("q_proj", "query_proj", "wq"),
    "k": ("k_proj", "key_proj", "wk"),
    "v": ("v_proj", "value_proj", "wv"),
    "o": ("o_proj", "out_proj", "wo"),
    "gate": ("gate_proj", "w1"),
    "up": ("up_proj", "w3"),
    "down": ("down_proj", "w2"),
}

LISTED = 6
"""Matrices that a message names."""


class Site(NamedTuple):
    """Names one place where inputs rest: the input of a linear layer, or (``act``) the activated gate.

    Attributes
    ----------
    block : int
        Index of the decoder block, from 0.
    role : str
        One of `LINEAR_ROLES`, or `ACT`.
    """

    block: int
    role: str

    def __str__(self) -> str:
        return f"{self.block}.{self.role}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Reads a site as it is written, such as ``"3.down"``."""
        block, role = text.split(".")
        return cls(int(block), role)


class Slot(NamedTuple):
    """Says where a module hangs: ``getattr(parent, attribute)``."""

    parent: nn.Module
    attribute: str

    @property
    def module(self) -> nn.Module:
        """Gives the module that hangs there."""
        return getattr(self.parent, self.attribute)


@dataclass(frozen=True)
class Decoder:
    """Shows the blocks of a model as sites.

    Attributes
    ----------
    trunk : nn.Module
        The module that owns the list of blocks; its forward sees token ids and attention mask.
    layers : nn.ModuleList
        The blocks.
    slots : dict of Site to Slot
        Every site of every block, the seven linear roles and `ACT`.
    """

    trunk: nn.Module
    layers: nn.ModuleList
    slots: dict[Site, Slot]

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """Finds the decoder of `model`.

        Raises
        ------
        UnsupportedModelError
            If no list of blocks has all seven roles (the message lists what was looked for), if the sites do not hold
            all matrices of a block (it lists the others), or if the list is not the model's path from token to logits.
        """
        best: tuple[nn.Module, nn.ModuleList] | None = None
        for module in model.modules():
            for child in module.children():
                is_longest = best is None or (isinstance(child, nn.ModuleList) and len(child) > len(best[1]))
                if isinstance(child, nn.ModuleList) and is_longest and all(_is_block(b) for b in child) and len(child):
                    best = (module, child)
        if best is None:
            looked_for = "; ".join(f"{role}: {' or '.join(names)}" for role, names in NAMES.items())
            found = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise UnsupportedModelError(
                f"{type(model).__name__} has no list of decoder blocks that each hold exactly one linear layer for "
                f"every role. Looked for nn.Linear modules named {looked_for}. Found linear layers named: "
                f"{', '.join(found) or 'none'}."
            )
        trunk, blocks = best
        slots = {Site(i, role): slot for i, block in enumerate(blocks) for role, slot in _slots(block).items()}
        decoder = cls(trunk, blocks, slots)
        decoder._check_whole(model)
        return decoder

    def _check_whole(self, model: nn.Module) -> None:
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        if embedding is not None and all(module is not embedding for module in self.trunk.modules()):
            raise UnsupportedModelError(
                f"{type(model).__name__} has blocks with every role only in its {type(self.trunk).__name__}, which "
                "takes no tokens; allowed: one list of blocks between the embedding of tokens and the output layer"
            )
        for i, block in enumerate(self.layers):
            share, others = held(block, (self.linear(Site(i, role)) for role in LINEAR_ROLES))
            if others:
                more = f" and {len(others) - LISTED} more" if len(others) > LISTED else ""
                raise UnsupportedModelError(
                    f"{type(model).__name__} has matrices beside its linear layers with a role: in block {i} the sites "
                    f"hold {share:.2f} of all elements; not covered: {', '.join(others[:LISTED])}{more}"
                )

    def elements_in(self, block: int) -> int:
        """Counts the elements of all matrices of one block."""
        return sum(matrices(self.layers[block]).values())

    @cached_property
    def elements(self) -> int:
        """Counts the elements of all matrices of all blocks: byte sparsity is a share of them."""
        return sum(self.elements_in(block) for block in range(self.blocks))

    @property
    def blocks(self) -> int:
        """Counts the blocks."""
        return 1 + max(site.block for site in self.slots)

    def linear(self, site: Site) -> nn.Linear:
        """Gives the linear layer at `site` (not for `ACT`)."""
        module = self.slots[site].module
        if not isinstance(module, nn.Linear):
            raise UnsupportedModelError(f"site {site} holds a {type(module).__name__}, not a linear layer")
        return module

    def sites(self, roles: tuple[str, ...] = LINEAR_ROLES) -> list[Site]:
        """Lists all sites with one of `roles`, block by block, in the order of `roles`."""
        return [Site(i, role) for i in range(self.blocks) for role in roles if Site(i, role) in self.slots]

    def check_roles(self, roles: tuple[str, ...]) -> None:
        """Refuses a role that some block lacks."""
        for role in roles:
            missing = [i for i in range(self.blocks) if Site(i, role) not in self.slots]
            if missing:
                raise UnsupportedModelError(
                    f"no site {role!r} in block {missing[0]}; this model's sites are {', '.join(self.roles)}"
                )

    @property
    def roles(self) -> tuple[str, ...]:
        """Lists the roles that every block has."""
        return tuple(r for r in (*LINEAR_ROLES, ACT) if all(Site(i, r) in self.slots for i in range(self.blocks)))


def _linears(block: nn.Module) -> dict[str, list[Slot]]:
    found: dict[str, list[Slot]] = {role: [] for role in NAMES}
    for parent in block.modules():
        for attribute, child in parent.named_children():
            for role, names in NAMES.items():
                if isinstance(child, nn.Linear) and attribute in names:
                    found[role].append(Slot(parent, attribute))
    return found


def _is_block(module: nn.Module) -> bool:
    return all(len(slots) == 1 for slots in _linears(module).values())


def _slots(block: nn.Module) -> dict[str, Slot]:
    slots = {role: found[0] for role, found in _linears(block).items()}
    mlp = slots["gate"].parent
    # The activation is the one child of the MLP that holds no weights.
    activations = [n for n, m in mlp.named_children() if not list(m.parameters()) and "drop" not in n]
    if len(activations) == 1:
        slots[ACT] = Slot(mlp, activations[0])
    return slots
