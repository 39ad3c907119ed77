"""Hashes models and texts, so that they can be told from others."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from resting.sparsifier.same_modules import modules_of

LARGE = 4 * 2**30
"""Bytes of a model, in bfloat16, from which on its fingerprint is a hash of the hashes of pieces.

One sha256 over a whole model is a chain: no second core can help, and a core hashes 1 to 2 GB a second. Fingerprints of
smaller models, which plans and results have named since the first version, are that chain.
"""
PIECE = 2**26
"""Entries of a piece: it is hashed, and copied from a GPU and rounded before, while others are."""
CHUNK = 2**24
"""Entries that are copied from a GPU at a time, into memory that stays where it is: 32 MB a thread."""
THREADS = 16

_of_thread = threading.local()
_known: WeakKeyDictionary[nn.Module, tuple[tuple[Any, ...], str]] = WeakKeyDictionary()


def of_tensor(tensor: Tensor) -> str:
    """Hashes a tensor's values (sha256)."""
    return hashlib.sha256(_bytes_of(tensor.detach().contiguous().cpu().flatten())).hexdigest()


def of_model(model: nn.Module) -> str:
    """Hashes all parameters, rounded to bfloat16, by name (sha256); those of a large model in pieces, side by side.

    The rounding makes the fingerprint the same whether the weights are loaded as float32 or as bfloat16. It is
    computed once for a model, and again after its weights were written to (writes through ``.data`` go unseen).
    """
    version = _version(model)
    if model in _known and _known[model][0] == version:
        return _known[model][1]
    digest = _of_pieces(model) if _is_large(model) else in_one_chain(model)
    _known[model] = (version, digest)
    return digest


def is_of(model: nn.Module, name: str) -> bool:
    """Tells whether `name` is a fingerprint of `model`, also one that an earlier version gave a large model."""
    actual = of_model(model)
    return name == actual or (_is_large(model) and name == in_one_chain(model))


def in_one_chain(model: nn.Module) -> str:
    """Hashes all parameters one after another, as all versions do for models that are not `LARGE`.

    The next tensor is fetched from its device and rounded while one is hashed.
    """
    digest = hashlib.sha256()
    with ThreadPoolExecutor(1) as ahead:
        waiting = None
        for name, parameter in model.named_parameters():
            fetched = name, parameter, ahead.submit(_rounded, parameter.detach())
            if waiting is not None:
                _add(digest, *waiting)
            waiting = fetched
        if waiting is not None:
            _add(digest, *waiting)
    return digest.hexdigest()


def _add(digest: Any, name: str, parameter: Tensor, fetched: Future[Tensor]) -> None:
    digest.update(f"{name}{list(parameter.shape)}".encode())
    digest.update(_bytes_of(fetched.result()))


def _of_pieces(model: nn.Module) -> str:
    """Hashes names, shapes and the hashes of pieces of all parameters, as many pieces at a time as there are cores."""
    digest = hashlib.sha256(b"pieces")
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        hashed = [
            (f"{name}{list(parameter.shape)}", [pool.submit(_of_piece, piece) for piece in _pieces(parameter.detach())])
            for name, parameter in model.named_parameters()
        ]
        for name, pieces in hashed:
            digest.update(name.encode())
            for piece in pieces:
                digest.update(piece.result())
    return digest.hexdigest()


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Yields `tensor` in rows together of about `PIECE` entries, so that no more than that is copied at a time."""
    if tensor.dim() < 2 or tensor.numel() <= PIECE:
        yield tensor
        return
    yield from tensor.split(max(1, PIECE // max(1, tensor[0].numel())))


def _of_piece(piece: Tensor) -> bytes:
    digest = hashlib.sha256()
    for chunk in piece.reshape(-1).split(CHUNK):
        digest.update(_bytes_of(_fetched(chunk)))
    return digest.digest()


def _fetched(chunk: Tensor) -> Tensor:
    """Copies a chunk from a GPU through memory of this thread, which the next chunk overwrites.

    Pages that may move would be copied twice, and by one thread at a time.
    """
    if not chunk.is_cuda:
        return _rounded(chunk)
    if not hasattr(_of_thread, "memory"):
        _of_thread.memory = torch.empty(CHUNK, dtype=torch.bfloat16, pin_memory=True)
    memory: Tensor = _of_thread.memory[: len(chunk)]
    return memory.copy_(chunk.to(torch.bfloat16))


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).cpu().contiguous().reshape(-1)


def _bytes_of(flat: Tensor) -> Any:
    """Shows the bytes of a tensor in memory, without a copy of them: hashing them lets other threads run."""
    return flat.view(torch.uint8).numpy()


def _is_large(model: nn.Module) -> bool:
    return 2 * sum(parameter.numel() for parameter in model.parameters()) >= LARGE


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
    held = ((id(m), n, p) for m in modules_of(model) for n, p in m._parameters.items() if p is not None)
    return tuple((m, n, p.data_ptr(), 0 if p.is_inference() else p._version) for m, n, p in held)
