"""Keeps finished cells: one file per cell, written whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from resting.benchmarks import cache
from resting.benchmarks.cells.cell import Result
from resting.benchmarks.errors import BenchmarkError

SCHEMA = 1
"""Of a cell's file. A file of an older one is read, of a newer one refused."""
FINISHED = ("done", "skipped", "diverged")
"""What is never run again. Cells that failed, ran out of memory or lacked data are, at the next run."""


NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class StoreError(BenchmarkError):
    """Says that the store cannot be read or written."""


@dataclass(frozen=True)
class Store:
    """Keeps cells by key, in a folder that several processes may use at once.

    Attributes
    ----------
    folder : Path
    """

    folder: Path

    @classmethod
    def default(cls) -> Store:
        """Return the store in the cache folder."""
        return cls(cache.root() / "cells")

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def keys(self) -> Iterator[str]:
        """List the keys of all cells with a file, in no order."""
        return (path.stem for path in self.folder.glob("*.json"))

    def load(self, key: str) -> Result | None:
        """Read the result of a cell, whatever its status; None where there is none, or only a damaged file.

        Raises
        ------
        StoreError
            If it was written by a newer version.
        """
        path = self.path(key)
        try:
            content = json.loads(path.read_text())
            schema = content.pop("schema", 1)
        except (OSError, ValueError, AttributeError, TypeError):
            return None
        if not isinstance(schema, int) or schema > SCHEMA:
            raise StoreError(f"{path} has schema {schema}; this version reads up to {SCHEMA}: a newer one wrote it")
        try:
            return Result(**content)
        except TypeError:
            return None

    def finished(self, key: str) -> Result | None:
        """Return the result of a cell that need not run again."""
        result = self.load(key)
        return result if result is not None and result.status in FINISHED else None

    def save(self, key: str, result: Result) -> None:
        """Keep a result.

        Raises
        ------
        StoreError
            If the disk is full; what was there before is as it was.
        """
        with full_disk_named(self.folder):
            cache.write_whole(self.path(key), cache.as_json({"schema": SCHEMA} | vars(result)))

    @contextmanager
    def claimed(self, key: str, wait: bool = False) -> Iterator[bool]:
        """Whether this process may run the cell; no other one may inside the block.

        The lock ends with the process, however that ends.

        Parameters
        ----------
        key : str
        wait : bool
            Until another process is done with it.
        """
        path = self.folder.with_name(f"{self.folder.name}-locks") / f"{key}.lock"
        with full_disk_named(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path)
        try:
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            # Who waits for the old file finds the cell finished: it looks after it has the lock.
            with suppress(OSError):
                path.unlink()
            lock.release()


@contextmanager
def full_disk_named(folder: Path) -> Iterator[None]:
    """Tell a full disk in one sentence.

    Raises
    ------
    StoreError
    """
    try:
        yield
    except OSError as error:
        if error.errno not in NO_SPACE:
            raise
        raise StoreError(
            f"no space left for {folder}: finished cells are kept; make room and run the same command again"
        ) from error
