"""Keeps what an interrupted fit has done so far, so that the same fit goes on from there and no other one does."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import safe_open

from resting.benchmarks.cells.identity import shared_version
from resting.benchmarks.errors import FitError, first_line
from resting.sparsifier import CalibratedModel, Sparsifier


def key_of(calibrated: CalibratedModel, method: Sparsifier) -> str:
    """Hash all that determines a fit: model, dtype, device, text, token policy, method, target, and the code."""
    identity = [*calibrated.identity, calibrated.setting, method.label, method.spec(), shared_version(method)]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


@contextmanager
def kept(checkpoint: Path | None, calibrated: CalibratedModel, method: Sparsifier) -> Iterator[None]:
    """Let `calibrated` keep its files in a folder of this fit's own below `checkpoint`, inside the ``with`` block.

    The folder stays when the block ends, also by an exception; `remove` takes it away.

    Raises
    ------
    FitError
        If the folder cannot be written to, another process fits there, or a file in it is damaged.
    """
    if checkpoint is None:
        yield
        return
    folder = checkpoint / key_of(calibrated, method)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise FitError(f"another process does this fit, with the checkpoint {folder}: wait for it to end") from error
    except OSError as error:
        raise FitError(f"the checkpoint {checkpoint} cannot be written: {error.strerror}") from error
    try:
        _check(folder)
        calibrated.folder = folder
        yield
    finally:
        lock.release()
        if [file.name for file in folder.iterdir()] == ["lock"]:  # nothing was kept
            remove(checkpoint, folder.name)


def remove(checkpoint: Path, key: str) -> None:
    """Remove what the fit of this key kept; what others keep there stays."""
    shutil.rmtree(checkpoint / key[:16], ignore_errors=True)
    with suppress(OSError):  # another fit keeps something there, or the user does
        checkpoint.rmdir()


def _check(folder: Path) -> None:
    for file in sorted((folder / "training").glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as opened:
                json.loads(opened.metadata()["counters"])
        except Exception as error:
            raise FitError(
                f"the checkpoint {file} is damaged ({first_line(error)}): remove it, and the fit begins again"
            ) from error
