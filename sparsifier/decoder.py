"""Shows the blocks of a model as sites."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from resting.sparsifier.blocks import Block
from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.projection import Projection
from resting.sparsifier.roles import ACT, ATTENTION, LINEAR_ROLES, MLP, NEURONS, computes, is_wanted
from resting.sparsifier.same_modules import Modules
from resting.sparsifier.sites import EXPERT, Site, Slot


@dataclass(frozen=True, eq=False)
class Decoder:
    """Shows the blocks of a model as sites.

    Attributes
    ----------
    trunk : nn.Module
        The module that owns the list of blocks; its forward sees token ids and attention mask.
    layers : nn.ModuleList
        The blocks.
    found : list of Block
        What was found in each of them.
    slots : dict of Site to Slot
        Where the module of every site hangs.
    """

    trunk: nn.Module
    layers: nn.ModuleList
    found: list[Block]
    slots: dict[Site, Slot]
    _listed: dict[tuple[str, ...], list[Site]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, model: nn.Module) -> Decoder:
        """Finds the decoder of `model`; the one that was found before, as long as somebody has it and it still holds.

        Raises
        ------
        UnsupportedModelError
            If no list of blocks on the path from tokens to logits has a layer with a role, or if a block is refused
            (`Block.of`): the message names block and role.
        """
        alive = [(known, modules) for known, modules in _found.get(model, []) if known() is not None]
        decoder = next((known() for known, modules in alive if modules.are_the_same()), None)
        if decoder is None:
            decoder = cls._search(model)
            if all(block.depends_on_modules_alone for block in decoder.found):
                _found[model] = [*alive, (ref(decoder), Modules(model))]
        return decoder

    @classmethod
    def _search(cls, model: nn.Module) -> Decoder:
        config: Any = getattr(model, "config", None)
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        best, slots = None, {}
        for trunk, layers in _lists(model):
            found = []
            for i, layer in enumerate(layers):
                try:
                    found.append(Block.of(layer, config))
                except UnsupportedModelError as error:
                    raise UnsupportedModelError(f"block {i} of {type(model).__name__} is refused: {error}") from None
            if sum(bool(block.projections) for block in found) > (0 if best is None else len(best.layers)):
                slots = {
                    Site(i, role, part): s for i, block in enumerate(found) for (part, role), s in block.slots.items()
                }
                best = cls(trunk, layers, found, slots)
        if best is None:
            names = {role: known for table in (ATTENTION, MLP) for role, known in table.items()}
            looked_for = "; ".join(f"{role}: {' or '.join(known)}" for role, known in names.items())
            linear = sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)})
            raise UnsupportedModelError(
                f"{type(model).__name__} has no list of decoder blocks with a linear layer that has a role, between "
                f"the embedding of tokens and the output layer. Looked for {looked_for}. Found linear layers named: "
                f"{', '.join(linear) or 'none'}."
            )
        return best

    @property
    def blocks(self) -> int:
        """Counts the blocks."""
        return len(self.layers)

    def projection(self, site: Site) -> Projection:
        """Gives the matrix at `site` (not for `ACT`)."""
        if site.role == ACT:
            raise UnsupportedModelError(f"site {site} is an activation and has no matrix")
        return self.found[site.block].projections[site.part, site.role]

    def linear(self, site: Site) -> Any:
        """Gives the linear layer at `site`, which is called with its input and gives its output.

        Raises
        ------
        UnsupportedModelError
            For experts in one tensor, which are called together.
        """
        matrix = self.projection(site)
        if matrix.expert is not None:
            raise UnsupportedModelError(f"the matrix at {site} is one of several experts' and no layer of its own")
        return matrix.module

    def in_one_tensor(self, site: Site) -> bool:
        """Tells whether `site` is one of experts in one tensor, which have no modules of their own."""
        return site.is_expert and self.found[site.block].experts is not None

    def slot_of_experts(self, block: int) -> Slot:
        """Says where the module of experts in one tensor hangs."""
        return next(slot for site, slot in self.slots.items() if site.block == block and site.is_expert)

    def share(self, site: Site) -> float:
        """Gives the share of tokens that come to `site`: less than 1 for an expert, if a router is even-handed."""
        return self.found[site.block].expert_share if site.is_expert else 1.0

    def elements_at(self, site: Site) -> float:
        """Counts the elements of the matrix at `site` that a token reads, on average."""
        return self.projection(site).elements * self.share(site)

    @cached_property
    def matrices(self) -> list[Site]:
        """Lists the sites of all matrices, those first that methods mask."""
        others = [Site(i, role, part) for i, block in enumerate(self.found) for part, role in block.projections]
        return list(dict.fromkeys([*self.sites(), *others]))

    def elements_in(self, block: int) -> float:
        """Counts the elements of one block's matrices that a token reads."""
        found = self.found[block]
        return sum(found.dense.values()) + sum(self.elements_at(Site(block, r, p)) for p, r in found.projections)

    @cached_property
    def elements(self) -> float:
        """Counts the elements of all blocks' matrices that a token reads: byte sparsity is a share of them."""
        return sum(self.elements_in(block) for block in range(self.blocks))

    @cached_property
    def covered(self) -> float:
        """Gives the share of `elements` that methods can mask; the rest is always read."""
        return sum(self.elements_at(site) for site in self.sites()) / self.elements

    @cached_property
    def after_zeros(self) -> set[Site]:
        """Lists the matrices whose input has exact zeros by nature: after a ReLU, or its square, without a gate."""
        acts = [site for site in self.slots if site.role == ACT and not site.is_expert]
        alone = [site for site in acts if len(self.rests_under_act(site)) == 1]
        return {under for site in alone for under in self.rests_under_act(site)}

    def rests_under_act(self, site: Site) -> dict[Site, float]:
        """Lists the matrices that a mask at `site`, an `ACT`, lets rest, with the share of them that can rest."""
        found = self.found[site.block].projections
        shares = {"up": 1.0, "gate_up": 0.5, "down": 1.0}
        if not any((site.part, role) in found for role in ("gate", "gate_up")):
            del shares["up"]  # without a gate up decides what rests, and is read
        return {Site(site.block, role, site.part): s for role, s in shares.items() if (site.part, role) in found}

    def neuron_sites(self) -> list[Site]:
        """Lists the gated MLPs whose neurons can rest, as sites with the role `NEURONS`.

        Raises
        ------
        UnsupportedModelError
            If there is none, if a block holds experts, or if a gate's activation looks at all neurons of a token.
        """
        for block, found in enumerate(self.found):
            if any(part.startswith(EXPERT) for part, _ in found.projections):
                raise UnsupportedModelError(
                    f"block {block} holds experts: neuron masks are for gated MLPs that every token goes through"
                )
        gated = [s for s in self.slots if s.role in ("gate", "gate_up") and s._replace(role=ACT) in self.slots]
        if not gated:
            raise UnsupportedModelError(
                f"no MLP of {type(self.trunk).__name__} has a gate whose activation is a module: a neuron mask rests "
                "rows of gate and up together with columns of down"
            )
        for site in gated:
            self._check_mlp(site)
            if getattr(self.slots[site].parent, "activation_sparsity", 0):
                raise UnsupportedModelError(
                    f"the gate of block {site.block} is cut by a quantile over all its neurons: none of its rows rests"
                )
        return [site._replace(role=NEURONS) for site in gated]

    def _check_mlp(self, gate: Site) -> None:
        """Refuses an MLP with a norm before down, say: its neurons then depend on one another."""
        parent = self.slots[gate].parent
        known = {slot.module for site, slot in self.slots.items() if slot.parent is parent}
        for name, child in parent.named_children():
            if child not in known and any(True for _ in child.parameters()):
                raise UnsupportedModelError(
                    f"the MLP of block {gate.block} has {name} beside gate, up and down: whether a neuron can rest "
                    "without the others is not known"
                )

    def rests_under_neurons(self, site: Site, whole: tuple[str, ...] = ()) -> dict[Site, float]:
        """Lists the matrices that a mask at `site`, a `NEURONS`, lets rest, with the share of them that can rest.

        Parameters
        ----------
        whole : tuple of str
            Which of gate and up are read whole all the same.
        """
        found = self.found[site.block].projections
        shares = {role: 1.0 for role in ("gate", "up", "down") if role not in whole}
        shares["gate_up"] = 1.0 - 0.5 * len(whole)
        return {Site(site.block, r, site.part): s for r, s in shares.items() if (site.part, r) in found and s}

    def mlp_shape(self, site: Site) -> tuple[int, int]:
        """Gives the width of the hidden state and the number of neurons in the MLP of `site`."""
        down = self.projection(site._replace(role="down"))
        return down.out_features, down.in_features

    def gate_and_up(self, site: Site) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
        """Gives the weights [neurons, hidden] of gate and up in the MLP of `site`, and their biases."""
        found = self.found[site.block].projections
        if (site.part, "gate_up") not in found:
            gate, up = found[site.part, "gate"], found[site.part, "up"]
            return (gate.weight, up.weight), (gate.bias, up.bias)
        both = found[site.part, "gate_up"]
        weights, biases = both.weight.chunk(2), (None, None) if both.bias is None else both.bias.chunk(2)
        return (weights[0], weights[1]), (biases[0], biases[1])

    def sites(self, roles: tuple[str, ...] = LINEAR_ROLES) -> list[Site]:
        """Lists all sites with one of `roles`, block by block, in the order of `roles`.

        A matrix that computes several of them, as fused ones do, is there where all of them are wanted.

        Raises
        ------
        UnsupportedModelError
            If only some of what a fused matrix computes is wanted.
        """
        if roles == (NEURONS,):
            return self.neuron_sites()
        if roles not in self._listed:
            self._listed[roles] = [site for block in range(self.blocks) for site in self._sites_in(block, roles)]
        return list(self._listed[roles])

    def _sites_in(self, block: int, roles: tuple[str, ...]) -> list[Site]:
        parts = list(dict.fromkeys(part for part, _ in self.found[block].slots))
        ranked: list[tuple[int, int, Site]] = []
        for part, role in self.found[block].slots:
            site = Site(block, role, part)
            if is_wanted(role, roles):
                rank = roles.index(role) if role in roles else min(roles.index(of) for of in computes(role))
                ranked.append((parts.index(part), rank, site))
        return [site for _, _, site in sorted(ranked, key=lambda found: found[:2])]

    def check_roles(self, roles: tuple[str, ...]) -> None:
        """Refuses a role that no block has; all seven of `LINEAR_ROLES` stand for those that there are."""
        present = {role for site in self.slots for role in (site.role, *computes(site.role))}
        missing = [role for role in roles if role not in present]
        if missing and not set(roles) >= set(LINEAR_ROLES):
            why = (
                " (no gate's activation is a module of its own, and no other has exact zeros)"
                if missing[0] == ACT
                else ""
            )
            raise UnsupportedModelError(
                f"no site {missing[0]!r} in any block{why}; this model's sites are {', '.join(self.roles)}"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        """Lists the roles that a block has, in whatever part of it."""
        return tuple(dict.fromkeys(site.role for site in self.slots))


_found: WeakKeyDictionary[nn.Module, list[tuple[ref[Decoder], Modules]]] = WeakKeyDictionary()
"""Several of one model, since its modules change under a transform, and change back."""


def _lists(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """Yields lists of modules beside the embedding of tokens, with the modules that own them."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    for owner in model.modules():
        lists = [child for child in owner.children() if isinstance(child, nn.ModuleList) and len(child)]
        if lists and (embedding is None or any(module is embedding for module in owner.modules())):
            yield from ((owner, found) for found in lists)
