"""Where downloads, converted models and finished cells are kept."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from resting.benchmarks.errors import AssetError
from resting.sparsifier.files import replacing

PARTS = ("wheels", "gguf", "models", "texts", "tokens", "tasks", "fits", "plans", "cells")


def root() -> Path:
    """The cache folder: ``$RESTING_CACHE``, else the user's own for ``resting-neurons``."""
    folder = Path(os.environ.get("RESTING_CACHE") or user_cache_path("resting-neurons")).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AssetError(
            f"the cache folder {folder} cannot be made ({error.strerror}); allowed: a RESTING_CACHE that can"
        ) from error
    for part in PARTS:
        if (folder / part).exists() and not (folder / part).is_dir():
            raise AssetError(f"{folder / part} is a file where a folder belongs: move it away")
    return folder


def write_whole(path: Path, text: str) -> None:
    """Write a file that is never seen half-written."""
    with replacing(path) as temporary:
        temporary.write_text(text)


def as_json(content: Any, indent: int | None = None) -> str:
    """Write `content` as JSON; numbers that are not finite, for which JSON has no word, become null."""
    return json.dumps(_finite(content), indent=indent, default=str, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
