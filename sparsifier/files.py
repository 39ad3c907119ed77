"""Writes files that are never seen half-written, also where several processes write the same one."""

from __future__ import annotations

import os
import secrets
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives this writer a file of its own, which takes the place of `path` when the block ends well.

    Yields
    ------
    Path
        Beside `path`, so that the last step is a rename on one file system.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Gives this writer an empty folder, which takes the place of `path` when the block ends well.

    What is in it gets the permissions that a new folder gets here, whatever a library gave it (safetensors: 0600).

    Yields
    ------
    Path
        Beside `path`, so that the last step is a rename on one file system.
    """
    path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, old = (path.with_name(f".{path.name}.{kind}-{secrets.token_hex(4)}") for kind in ("new", "old"))
    temporary.mkdir()
    try:
        yield temporary
        _give_permissions(temporary)
        if path.exists():
            path.rename(old)
        try:
            temporary.rename(path)
        except OSError:
            if old.exists() and not path.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def _give_permissions(folder: Path) -> None:
    """Gives all that is below `folder` its own permissions, files those without the right to be run."""
    mode = folder.stat().st_mode & 0o777
    for found in folder.rglob("*"):
        found.chmod(mode if found.is_dir() else mode & 0o666)
