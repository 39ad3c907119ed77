"""Gives the token ids of a text. They are computed once and kept in the cache: a long text takes seconds."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resting.benchmarks import cache
from resting.sparsifier.files import replacing

LEAST = 100_000
"""Characters from which on a text's ids are kept: a shorter one is tokenized in a moment."""
FORMAT = 1
"""Of the files: another one makes other keys."""
DIGEST = 32
"""Bytes at the beginning of a file: the SHA-256 of the others."""


def ids_of(text: str, tokenizer: Any) -> Tensor:
    """Return the ids of all tokens of `text`, without special ones.

    Parameters
    ----------
    text : str
    tokenizer : transformers.PreTrainedTokenizer

    Returns
    -------
    Tensor [n], int64
    """
    key = _key(text, tokenizer) if len(text) >= LEAST else None
    if key is None:
        return torch.from_numpy(_tokenized(text, tokenizer))
    path = cache.root() / "tokens" / key
    found = _read(path)
    if found is None:
        found = _tokenized(text, tokenizer)
        with suppress(OSError):  # a cache that cannot be written costs time here, and no more
            _write(path, found)
    return torch.from_numpy(found)


def _tokenized(text: str, tokenizer: Any) -> np.ndarray[Any, np.dtype[np.int64]]:
    return np.array(tokenizer(text, add_special_tokens=False, verbose=False).input_ids, np.int64)


def _key(text: str, tokenizer: Any) -> str | None:
    """Hash all that the ids depend on; None for a tokenizer of which that cannot be said."""
    import tokenizers
    import transformers

    if not _is_plain(tokenizer):
        return None
    try:
        said = tokenizer.backend_tokenizer.to_str()
    except Exception:  # of the class Exception itself: a part of it is written in Python
        return None
    about = {
        "format": FORMAT,
        "text": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        "tokenizer": said,
        "tokens": len(tokenizer),  # of two with one id the JSON has one
        "kind": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}",
        "split_special_tokens": tokenizer.split_special_tokens,
        "versions": [tokenizers.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def _is_plain(tokenizer: Any) -> bool:
    """Whether the ids come from the tokenizers library, by transformers' own code alone, and are always the same."""
    import transformers

    kind, base = type(tokenizer), transformers.PreTrainedTokenizerFast
    if not isinstance(tokenizer, base) or not kind.__module__.startswith("transformers."):
        return False
    if any(getattr(kind, name) is not getattr(base, name) for name in ("__call__", "_encode_plus")):
        return False
    if any(callable(value) and hasattr(kind, name) for name, value in vars(tokenizer).items()):  # a method of its own
        return False
    return getattr(tokenizer.backend_tokenizer.model, "dropout", None) is None


def _read(path: Path) -> np.ndarray[Any, np.dtype[np.int64]] | None:
    """Read what `_write` wrote; None where it is not there, or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, ids = content[:DIGEST], content[DIGEST:]
    return np.frombuffer(ids, "<u4").astype(np.int64) if hashlib.sha256(ids).digest() == digest else None


def _write(path: Path, found: np.ndarray[Any, np.dtype[np.int64]]) -> None:
    ids = found.astype("<u4").tobytes()
    with replacing(path) as temporary:
        temporary.write_bytes(hashlib.sha256(ids).digest() + ids)
