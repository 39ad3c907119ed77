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
        self._seen = [(ref(module), type(module), [_held(t) for t in _tables(module)]) for module in model.modules()]

    def are_the_same(self) -> bool:
        """Tells whether every module has the children, parameters and buffers that it had, of the same kinds."""
        for known, kind, held in self._seen:
            module = known()
            if module is None or type(module) is not kind:
                return False
            if not all(map(_is_same, _tables(module), held)):
                return False
        return True


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._modules, module._parameters, module._buffers


def _held(table: dict[str, Any]) -> tuple[tuple[str, Any, Any], ...]:
    return tuple((name, None if one is None else ref(one), _kind(one)) for name, one in table.items())


def _is_same(table: dict[str, Any], held: tuple[tuple[str, Any, Any], ...]) -> bool:
    if len(table) != len(held):
        return False
    for name, known, kind in held:
        one = table.get(name)
        if one is None or known is None:
            if name not in table or one is not known:
                return False
        elif known() is not one or _kind(one) != kind:
            return False
    return True


def _kind(one: Any) -> Any:
    """Says of a tensor what may change while it stays the same object: ``model.half()`` does that."""
    return (type(one), one.dtype, one.device, one.shape) if isinstance(one, torch.Tensor) else None
