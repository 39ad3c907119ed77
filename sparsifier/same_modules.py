"""Tells whether a model still has the modules and the kinds of tensors that it had."""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch
from torch import nn


class Modules:
    """Remembers modules and tensors of a model by identity, and keeps none of them alive.

    It does not see attributes of other kinds, nor the numbers in tensors.

    Parameters
    ----------
    model : nn.Module
    """

    def __init__(self, model: nn.Module) -> None:
        self._seen = [(ref(one), type(one), [_held(t) for t in _tables(one)]) for one in modules_of(model)]

    def are_the_same(self) -> bool:
        """Tells whether every module has the children, parameters and buffers that it had, of the same kinds."""
        for known, kind, tables in self._seen:
            module = known()
            if module is None or type(module) is not kind:
                return False
            for table, held in zip(_tables(module), tables):
                if len(table) != len(held) or (held and not _is_same(table, held)):
                    return False
        return True


def modules_of(model: nn.Module) -> list[nn.Module]:
    """Lists `model` and all modules in it, each once: ``model.modules()`` takes several times as long."""
    found = [model]
    known: set[nn.Module | None] = {None, model}
    for module in found:
        for child in module._modules.values():
            if child not in known:
                known.add(child)
                found.append(child)  # type: ignore[arg-type]  # None is known
    return found


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _held(table: dict[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    return tuple((name, None if one is None else ref(one), _kind(one)) for name, one in table.items())


def _is_same(table: dict[str, Any], held: tuple[tuple[str, Any, Any], ...]) -> bool:
    for name, known, kind in held:
        one = table.get(name)
        if one is None or known is None:
            if name not in table or one is not known:
                return False
        elif known() is not one or (kind is not None and _kind(one) != kind):
            return False
    return True


def _kind(one: Any) -> Any:
    """Says of a tensor what may change while it stays the same object: ``model.half()`` does that."""
    return (type(one), one.dtype, one.device, one.shape) if isinstance(one, torch.Tensor) else None
