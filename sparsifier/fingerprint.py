"""Hashes models and texts, so that they can be told from others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

_known: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def of_tensor(tensor: Tensor) -> str:
    """Hashes a tensor's values (sha256)."""
    return hashlib.sha256(tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()).hexdigest()


def of_model(model: nn.Module) -> str:
    """Hashes all parameters, rounded to bfloat16, by name (sha256).

    The rounding makes the fingerprint the same whether the weights are loaded as float32 or as bfloat16. It is
    computed once for a model, and again after its weights were written to (writes through ``.data`` go unseen).
    """
    parameters = list(model.named_parameters())
    version = _version(model)
    if model in _known and _known[model][0] == version:
        return _known[model][1]
    digest = hashlib.sha256()
    for name, parameter in parameters:
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(
            parameter.detach().to(torch.bfloat16).cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    _known[model] = (version, digest.hexdigest())
    return digest.hexdigest()


def declare(model: nn.Module, origin: str) -> None:
    """Gives `model` the fingerprint of what its weights come from, as long as they are not written to.

    For random weights, whose gigabytes are determined by a seed and need not be read to be told apart.
    """
    _known[model] = (_version(model), hashlib.sha256(origin.encode()).hexdigest())


@contextmanager
def standing_for(model: nn.Module, digest: str) -> Iterator[None]:
    """Gives `model` the fingerprint `digest` inside the ``with`` block, as long as its weights are not written to.

    For weights that were exchanged for others which compute the same; they are put back after the block.
    """
    before = _known.get(model)
    _known[model] = _version(model), digest
    try:
        yield
    finally:
        if before is not None:
            _known[model] = before


class Moving:
    """Keeps what is known of a model while its weights lie elsewhere, unless they are written to or moved there.

    Parameters
    ----------
    model : nn.Module
        Before its weights are moved.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model, known = model, _known.get(model)
        self._digest = known[1] if known is not None and known[0] == _version(model) else None
        self._there: tuple[Any, ...] | None = None

    def moved(self) -> None:
        """Says that the weights lie where they are to stay for a while."""
        self._there = _version(self._model)

    def leaving(self) -> None:
        """Says that the weights will be moved back next."""
        if self._there != _version(self._model):
            self._digest = None

    def back(self) -> None:
        """Says that the weights are back, bit for bit as they were if nobody wrote to them."""
        if self._digest is not None and self._there is not None:
            _known[self._model] = _version(self._model), self._digest


def _version(model: nn.Module) -> tuple[Any, ...]:
    return tuple((n, p.data_ptr(), 0 if p.is_inference() else p._version) for n, p in model.named_parameters())
