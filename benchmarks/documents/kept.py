"""Keeps the documents of a text under the hash of what they say, so that a result can be measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from resting.sparsifier.files import replacing


def sha256(documents: Sequence[str]) -> str:
    """Return the hash of documents in their order, whatever file they are from."""
    return hashlib.sha256(_written(documents).encode()).hexdigest()


def keep(folder: Path, documents: Sequence[str]) -> str:
    """Write `documents` into `folder`, and return their hash."""
    found = sha256(documents)
    if load(folder, found) is None:
        with replacing(folder / f"{found}.json") as temporary:
            temporary.write_text(_written(documents), encoding="utf-8")
    return found


def load(folder: Path, wanted: str) -> list[str] | None:
    """Read the documents with this hash; None where there is no copy, or a damaged one."""
    try:
        found = json.loads((folder / f"{wanted}.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(found, list) and all(isinstance(one, str) for one in found)
    return found if whole and sha256(found) == wanted else None


def _written(documents: Sequence[str]) -> str:
    # Half a surrogate pair, which JSON can write and UTF-8 cannot, becomes its escape.
    return json.dumps(list(documents), ensure_ascii=True)
