"""Refuses to go on where the code on disk is no longer the code in memory: numbers would be kept under another's key.

Keys are made of files, and a process computes with what it imported from them. A file is compared with what it was
when this process read it first; a worker is compared with who sent its job.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from resting.benchmarks.errors import BenchmarkError

Stamp = tuple[int, int]
"""Time of the last change, in nanoseconds, and size."""

_first: dict[Path, tuple[Any, Stamp | None]] = {}
"""Of a file, when this process asked for it first: the import that it came from, and its last change and size."""


class CodeChangedError(BenchmarkError):
    """The code that numbers are kept under is not the code that computes them."""


def note(files: Mapping[str, Path]) -> None:
    """Remember files as they are now, by the names of their modules; one that was loaded again is another one."""
    for name, file in files.items():
        imported = getattr(sys.modules.get(name), "__spec__", None)
        if file not in _first or _first[file][0] is not imported:
            _first[file] = imported, _stamp(file)


def check_unchanged() -> None:
    """Refuse to go on after a change of a file that `note` was told of.

    Raises
    ------
    CodeChangedError
        The message names the file.
    """
    for file, (_, then) in _first.items():
        if _stamp(file) != then:
            raise CodeChangedError(
                f"{file} was changed while this process runs with the code of before: the present cell is not kept; "
                "run the same command again, finished cells are not measured again"
            )


def check_same(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Refuse to measure here what another process made the key of, where this one would make another key.

    Parameters
    ----------
    mine, theirs : mapping
        What goes into the key, by its name.

    Raises
    ------
    CodeChangedError
        The message names the first thing that differs.
    """
    for name in sorted(mine.keys() | theirs.keys()):
        here, there = (as_text(one.get(name)) for one in (mine, theirs))
        if here != there:
            raise CodeChangedError(
                f"{name} is {here[:100]} where the cell is to be measured and was {there[:100]} where the run began: "
                "the code or a package was changed since, or is another one there; run the same command again"
            )


def as_text(value: Any) -> str:
    """Write what goes into a key as JSON, the same in every process: of a set its members in order."""
    return json.dumps(value, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, set | frozenset) else str(value)


def _stamp(file: Path) -> Stamp | None:
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size
