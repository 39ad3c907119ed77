"""Finds the sites of one decoder block, by the names and shapes of its layers and never by its class."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from resting.sparsifier.activations import has_zeros
from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.experts import Experts, experts_per_token
from resting.sparsifier.matrices import matrices
from resting.sparsifier.projection import Projection, is_linear
from resting.sparsifier.roles import ACT, ATTENTION, INPUT_OF, LINEAR_ROLES, MLP
from resting.sparsifier.sites import EXPERT, SHARED, Slot

ORDER = ("q", "k", "v", "qkv", "q_a", "q_b", "kv", "kv_a", "kv_b", *LINEAR_ROLES[3:5], "up", "gate_up", "down")
IN_ATTENTION, IN_MLP = ({name: role for role, names in of.items() for name in names} for of in (ATTENTION, MLP))
STATE = (nn.Conv1d, nn.Conv2d)
"""Layers that make a module with q, k and v a mixer with a state: it stays dense."""


@dataclass
class Block:
    """Shows one block.

    Attributes
    ----------
    slots : dict of (part, role) to Slot
        Where the module of every site hangs, `ACT` too; all experts have the slot of the module that holds them.
    projections : dict of (part, role) to Projection
        The matrix of every site but `ACT`.
    experts : Experts, optional
        Experts in one tensor.
    listed : Slot, optional
        Where experts hang that are a list of MLPs.
    expert_share : float
        Share of the experts that a token goes through.
    dense : dict of str to int
        Elements of the matrices that no site has, by name: every token reads them.
    """

    slots: dict[tuple[str, str], Slot] = field(default_factory=dict)
    projections: dict[tuple[str, str], Projection] = field(default_factory=dict)
    experts: Experts | None = None
    listed: Slot | None = None
    expert_share: float = 1.0
    dense: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, block: nn.Module, config: object) -> Block:
        """Finds the sites of `block`.

        Raises
        ------
        UnsupportedModelError
            If a role is missing, doubled or held by a layer of an unknown kind, or if it is not known which of the
            block's matrices a token reads.
        """
        found = cls()
        attention: list[dict[str, Slot]] = []
        mlps: list[dict[str, Slot]] = []
        for parent in _parents(block, found, config):
            layers = _layers(parent, IN_ATTENTION)
            if {"q", "qkv", "q_a"} & layers.keys():
                if not any(isinstance(child, STATE) for child in parent.children()):
                    attention.append(_checked(layers, "o"))
                continue
            layers = _layers(parent, IN_MLP)
            if {"up", "gate_up"} & layers.keys():
                mlps.append(_checked(layers, "down"))
        for kind, groups in {"attention module": attention, "MLP": mlps}.items():
            if len(groups) > 1:
                role = next(iter(groups[1]))
                raise UnsupportedModelError(f"role {role!r} is doubled: it has more than one {kind}")
        part = SHARED if found.experts is not None or found.listed is not None else ""
        for name, groups in (("", attention), (part, mlps)):
            for layers in groups:
                for role in layers:
                    found.slots[name, role] = layers[role]
                    found.projections[name, role] = Projection.of(layers[role].module)
        for layers in mlps:
            found._add_act(part, layers)
        found._add_experts()
        found._add_listed(config)
        found._see_dense(block)
        return found

    @property
    def depends_on_modules_alone(self) -> bool:
        """Tells whether no number decided: of experts those of a config do, without a gate those of an activation."""
        has_experts = self.experts is not None or self.listed is not None
        gated = {part for part, role in self.projections if role in ("gate", "gate_up")}
        return not has_experts and all(part in gated for part, role in self.projections if role == "up")

    def _add_act(self, part: str, mlp: dict[str, Slot]) -> None:
        _check_widths(mlp)
        if act := _activation(mlp):
            self.slots[part, ACT] = act

    def _add_listed(self, config: object) -> None:
        if self.listed is None:
            return
        experts = self.listed.module
        self.expert_share = experts_per_token(config, type(experts).__name__) / len(list(experts.children()))
        for i, module in enumerate(experts.children()):
            layers = _checked(_layers(module, IN_MLP), "down")
            for role in layers:
                self.slots[f"{EXPERT}{i}", role] = layers[role]
                self.projections[f"{EXPERT}{i}", role] = Projection.of(layers[role].module)
            self._add_act(f"{EXPERT}{i}", layers)

    def _add_experts(self) -> None:
        if self.experts is None:
            return
        self.expert_share = self.experts.share
        slot = self.slots.pop((EXPERT, ""))
        for expert in range(self.experts.count):
            for role in self.experts.roles:
                self.slots[f"{EXPERT}{expert}", role] = slot
                self.projections[f"{EXPERT}{expert}", role] = self.experts.projection(role, expert)
            if self.experts.has_act:
                self.slots[f"{EXPERT}{expert}", ACT] = slot

    def _see_dense(self, block: nn.Module) -> None:
        """Takes note of what no site has, and refuses what a token may or may not read."""
        modules = {p.module for p in self.projections.values()}
        prefixes = tuple(
            f"{name}." for name, module in block.named_modules(remove_duplicate=False) if module in modules
        )
        self.dense = {name: size for name, size in matrices(block).items() if not name.startswith(prefixes)}
        known = None if self.listed is None else self.listed.module
        lists = [n for n, module in block.named_modules() if isinstance(module, nn.ModuleList) and module is not known]
        for name in self.dense:
            owner = block.get_submodule(name.rpartition(".")[0])
            if "expert" in f"{name} {type(owner).__name__}".lower() and not is_linear(owner):
                raise UnsupportedModelError(
                    f"{type(owner).__name__} holds experts in {name}, of a form that is not known"
                )
            if listed := [of for of in lists if name.startswith(f"{of}.")]:
                raise UnsupportedModelError(
                    f"{listed[0]} is a list of modules with matrices: which of them a token reads is not known"
                )


def _parents(block: nn.Module, found: Block, config: object) -> Iterator[nn.Module]:
    """Yields the modules of a block whose children may have roles, and takes out the experts."""

    def visit(module: nn.Module) -> Iterator[nn.Module]:
        yield module
        for name, child in module.named_children():
            if (experts := Experts.of(child, config)) is not None:
                if found.experts is not None:
                    raise UnsupportedModelError("it has more than one module of experts")
                found.experts = experts
                found.slots[EXPERT, ""] = Slot(module, name)
            elif isinstance(child, nn.ModuleList):
                if len(child) > 1 and all({"up", "gate_up"} & _layers(one, IN_MLP).keys() for one in child):
                    if found.listed is not None:
                        raise UnsupportedModelError("it has more than one list of MLPs")
                    found.listed = Slot(module, name)
            else:
                yield from visit(child)

    return visit(block)


def _layers(parent: nn.Module, roles: dict[str, str]) -> dict[str, Slot]:
    """Finds the children of `parent` with a role, by their names; those that hold no matrix have none."""
    layers: dict[str, Slot] = {}
    for name, child in parent.named_children():
        if (role := roles.get(name)) is None or not (is_linear(child) or matrices(child)):
            continue
        if not is_linear(child):
            raise UnsupportedModelError(
                f"role {role!r} is of an unknown kind: {name} is a {type(child).__name__}, no linear layer"
            )
        if role in layers:
            raise UnsupportedModelError(f"role {role!r} is doubled: {layers[role].attribute} and {name}")
        layers[role] = Slot(parent, name)
    return dict(sorted(layers.items(), key=lambda found: ORDER.index(found[0])))


def _checked(layers: dict[str, Slot], last: str) -> dict[str, Slot]:
    """Makes sure that roles which belong together are there, and that layers which read one input can."""
    needed = [(next(iter(layers)), last), ("q_a", "q_b"), ("q_b", "q_a"), ("kv_a", "kv_b"), ("kv_b", "kv_a")]
    for role, other in needed:
        if role in layers and other not in layers:
            raise UnsupportedModelError(f"role {other!r} is missing beside {layers[role].attribute}")
    inputs: dict[str, tuple[str, int]] = {}
    for role, slot in layers.items():
        width = Projection.of(slot.module).in_features
        name, known = inputs.setdefault(INPUT_OF[role], (slot.attribute, width))
        if width != known:
            raise UnsupportedModelError(
                f"{name} has {known} inputs and {slot.attribute} has {width}, where both should read one tensor"
            )
    return layers


def _check_widths(mlp: dict[str, Slot]) -> None:
    """Makes sure that what reads after what gives, so that roles are not guessed from names alone."""
    widths = {role: Projection.of(slot.module) for role, slot in mlp.items()}
    given = [p.out_features // (2 if role == "gate_up" else 1) for role, p in widths.items() if role != "down"]
    if set(given) != {widths["down"].in_features} or ("gate" in mlp and "gate_up" in mlp):
        shapes = ", ".join(f"{mlp[role].attribute} [{p.out_features}, {p.in_features}]" for role, p in widths.items())
        raise UnsupportedModelError(f"an MLP of an unknown kind: {shapes}")


def _activation(mlp: dict[str, Slot]) -> Slot | None:
    """Finds the activation whose output can rest: that of a gate, or one with exact zeros where there is no gate."""
    parent = mlp["down"].parent
    found = [name for name, m in parent.named_children() if not list(m.parameters()) and "drop" not in name]
    if len(found) != 1 or (not {"gate", "gate_up"} & mlp.keys() and not has_zeros(getattr(parent, found[0]))):
        return None
    return Slot(parent, found[0])
