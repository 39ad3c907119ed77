"""Reads the documents in one file: of text, JSON, JSON lines or Parquet."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from resting.benchmarks.errors import AssetError

FIELDS = ("text", "content", "document", "story")
"""Fields that are taken where none is named, the first that is there."""
TABLES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
"""Endings of files that have fields; what ends otherwise is text."""
BLANK_LINES = re.compile(r"\n(?:[ \t]*\n)+")


def has_fields(name: str) -> bool:
    """Tell whether a file of this name is a table, whose documents stand in a field."""
    return name.lower().endswith(TABLES)


def read(path: Path, field: str | None, shown: str) -> Iterator[str]:
    """Yield the documents of a file, blank ones included.

    Parameters
    ----------
    path : Path
    field : str, optional
        Of a table; the first of `FIELDS` that is there where None.
    shown : str
        What messages call the file.

    Raises
    ------
    AssetError
        If a row lacks the field, or holds something else than text in it; the message names the row.
    OSError, UnicodeDecodeError
        If the file cannot be read, or is not UTF-8.
    """
    name = path.name.lower()
    if not has_fields(name):
        if field is not None:
            raise AssetError(f"{shown} is a file of text and has no field {field!r}; allowed: its path alone")
        yield from BLANK_LINES.split(path.read_text(encoding="utf-8-sig"))
    elif name.endswith(".parquet"):
        yield from _parquet(path, field, shown)
    else:
        with _opened(path) as file:
            rows = _lines(file, shown) if ".jsonl" in name else _json(file, shown)
            for number, row in enumerate(rows, 1):
                yield _text(row, number, field, shown)


def _opened(path: Path) -> IO[str]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _lines(file: IO[str], shown: str) -> Iterator[Any]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise AssetError(f"line {number} of {shown} is not JSON: {error}") from error


def _json(file: IO[str], shown: str) -> Iterator[Any]:
    """Rows of a list; a file whose lines are rows of their own is read as well, as data sets on the hub have them."""
    whole = file.read()
    try:
        found = json.loads(whole)
    except (ValueError, RecursionError):
        yield from _lines(iter(whole.splitlines()), shown)  # type: ignore[arg-type]
        return
    if not isinstance(found, list):
        found = [found]
    yield from found


def _text(row: Any, number: int, field: str | None, shown: str) -> str:
    if isinstance(row, str) and field is None:
        return row
    if not isinstance(row, dict):
        raise AssetError(f"row {number} of {shown} is no object with fields; allowed: objects, one a document")
    chosen = field_of(list(row), field, f"row {number} of {shown}")
    return _checked(row[chosen], number, chosen, shown)


def _checked(value: Any, number: int, field: str, shown: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        kind = type(value).__name__
        raise AssetError(f"field {field!r} in row {number} of {shown} holds {kind}; allowed: text")
    return value


def _parquet(path: Path, field: str | None, shown: str) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowException as error:
        raise AssetError(f"{shown} is not a Parquet file: {str(error).splitlines()[0]}") from error
    chosen, number = field_of(file.schema_arrow.names, field, shown), 0
    for batch in file.iter_batches(columns=[chosen]):
        for value in batch.column(0).to_pylist():
            number += 1
            yield _checked(value, number, chosen, shown)


def field_of(names: list[str], asked: str | None, shown: str) -> str:
    """Choose the field of the documents.

    Raises
    ------
    AssetError
        If it is not among `names`; the message lists them.
    """
    found = next((name for name in ([asked] if asked else FIELDS) if name in names), None)
    if found is None:
        lacking = f"no field {asked!r}" if asked else f"no field {' or '.join(FIELDS)}"
        raise AssetError(f"{shown} has {lacking}; allowed after a colon: {', '.join(names)}")
    return found
