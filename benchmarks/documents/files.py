"""Reads the documents in a file of the user's."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resting.benchmarks.documents import rows
from resting.benchmarks.errors import AssetError, first_line

LARGEST = 512 * 2**20
"""Bytes of a file: more would fill the memory, and is far beyond what is ever measured."""


def parted(spec: str) -> tuple[str, str | None]:
    """Split ``FILE:FIELD`` into path and field; the field is None where there is none."""
    left, colon, field = spec.rpartition(":")
    if colon and field and rows.has_fields(left) and not rows.has_fields(spec):
        return left, field
    return spec, None


def documents(path: Path, field: str | None = None) -> list[str]:
    """Read the documents of a file, each once and without blank ones.

    Those of a text file are what blank lines part, those of a table (JSON, JSON lines, Parquet) its rows.

    Raises
    ------
    AssetError
        If the file cannot be read, is not UTF-8, is too large, lacks the field, or holds no text.
    """
    with _named(path):
        return distinct(rows.read(opened(path), field, path.name), path.name)


def whole(path: Path) -> str:
    """Read a text file as one document.

    Raises
    ------
    AssetError
        As `documents`.
    """
    with _named(path):
        return opened(path).read_text(encoding="utf-8-sig")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say in one sentence which file cannot be read, and why."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise AssetError(f"the text file {path} cannot be read: it is not UTF-8 text") from error
    except (OSError, EOFError, zlib.error) as error:
        raise AssetError(f"the text file {path} cannot be read: {reason(error)}") from error


def opened(path: Path) -> Path:
    """Return `path` with the user's home folder in it.

    Raises
    ------
    AssetError
        If there is no such file, or it is too large.
    """
    try:
        found = path.expanduser()
        size = found.stat().st_size
        if size <= LARGEST and not found.is_dir():
            return found
        said = "Is a directory" if found.is_dir() else f"it has more than {LARGEST // 2**20} MB; allowed: a part of it"
    except (OSError, RuntimeError, ValueError) as error:  # there is no such user; a name with a null
        said = reason(error)
    raise AssetError(f"the text file {_short(path)} cannot be read: {said}")


def _short(path: Path) -> str:
    return str(path)[:80]


def reason(error: BaseException) -> str:
    """Say why a file could not be read, without its path."""
    return str(getattr(error, "strerror", None) or first_line(error))


def distinct(found: Iterable[str], shown: str) -> list[str]:
    """Keep every document once, and none that is blank.

    Raises
    ------
    AssetError
        If nothing is left, or a document is no text that UTF-8 could write.
    """
    kept = [document for document in dict.fromkeys(found) if document.strip()]
    if not kept:
        raise AssetError(f"{shown} holds no text")
    for document in kept:
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise AssetError(f"{shown} holds half of a surrogate pair, which is no text: {document[:40]!r}") from error
    return kept
