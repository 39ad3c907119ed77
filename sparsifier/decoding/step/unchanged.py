"""Tells whether a model is still the one that a fast step was made for: its weights, its modules and their hooks."""

from __future__ import annotations

from enum import Enum
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as module_state
from torch.utils.hooks import RemovableHandle

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)
WITHOUT_EFFECT = (
    # A step has no use for them: they tell layers which tokens are sparse.
    "resting.sparsifier.token_tracker",
    "resting.sparsifier.routed_tokens",
    # They show neuron masks what they look at, which a step computes itself.
    "resting.sparsifier.neurons.down",
    # These stay once they were asked for hidden states, and look on only while they are asked again.
    "transformers.utils.output_capturing",
    "transformers.utils.generic",
)
"""Modules whose hooks a step may pass over."""

version_of = attrgetter("_version")


class Change(Enum):
    """Says what has changed about a model."""

    NOTHING = "nothing"
    WEIGHTS = "weights"
    MODULES = "modules"


class Unchanged:
    """Watches the weights and modules of `model`.

    Writes through ``tensor.data`` in place go unseen, as they do in `fingerprint`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.renew()

    def renew(self) -> None:
        """Takes the model as it is."""
        owners = list(self._model.modules())
        self._parents = [owner._modules for owner in owners if owner._modules]
        tables: list[dict[str, Any]] = [table for owner in owners for table in (owner._parameters, owner._buffers)]
        places = [(table, name) for table in tables for name, found in table.items() if found is not None]
        self._tables: list[dict[str, Any]] = [table for table, _ in places]
        self._names = [name for _, name in places]
        self._tensors = self._tensors_now()  # held, so that no other tensor gets their memory
        self._children, self._kinds = self._children_now(), [_kind(tensor) for tensor in self._tensors]
        self._addresses, self._writes = _addresses(self._tensors), _writes(self._tensors)

    def _children_now(self) -> list[tuple[Any, ...]]:
        return list(map(tuple, map(dict.values, self._parents)))

    def _tensors_now(self) -> list[Any]:
        return list(map(dict.get, self._tables, self._names))

    def change(self) -> Change:
        """Says what has changed since `renew`: weights that were written to or moved, or other modules and dtypes."""
        if self._children_now() != self._children:
            return Change.MODULES
        tensors = self._tensors_now()
        try:
            if _addresses(tensors) == self._addresses and _writes(tensors) == self._writes:
                return Change.NOTHING
        except TypeError:  # one of them is none any more
            return Change.MODULES
        return Change.WEIGHTS if [_kind(tensor) for tensor in tensors] == self._kinds else Change.MODULES


class Hooks:
    """Looks for hooks on modules inside of a model, and for modules with a forward of their own: a step passes over."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen, self._sizes = -1, [0]
        self._where = ""
        self._dicts = [module.__dict__ for module in model.modules()]

    def found(self) -> bool:
        """Tells whether there is one; modules are looked at only after one of them got a hook or an attribute."""
        made, sizes = RemovableHandle.next_id, list(map(len, self._dicts))
        if self._where or made != self._seen or sizes != self._sizes:
            self._where, self._seen, self._sizes = self.where(), made, sizes
        return bool(self._where)

    def where(self) -> str:
        """Names the first module that has one; empty where there is none."""
        for name in GLOBAL_HOOKS:
            if getattr(module_state, name, {}):
                return "every module"
        for place, inner in self._model.named_modules():
            if inner is self._model:
                continue
            forward = inner.__dict__.get("forward")  # where accelerate hangs its hooks in
            if forward is not None and getattr(forward, "__func__", None) is not type(inner).forward:
                return place
            if any(has_effect(hook) for name in HOOKS for hook in getattr(inner, name).values()):
                return place
        return ""


def _addresses(tensors: list[Any]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _writes(tensors: list[Any]) -> list[int]:
    """Counts the writes to each of `tensors`; those made in inference mode do not count theirs."""
    try:
        return list(map(version_of, tensors))
    except RuntimeError:
        return [0 if tensor.is_inference() else tensor._version for tensor in tensors]


def _kind(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.device, tensor.shape


def has_effect(hook: Any) -> bool:
    """Tells whether a step may not pass over `hook`."""
    return getattr(hook, "__module__", None) not in WITHOUT_EFFECT
