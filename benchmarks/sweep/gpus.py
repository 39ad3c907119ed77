"""Gives every worker on a machine a GPU of its own."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from filelock import FileLock, Timeout

from resting.benchmarks import cache

PATIENCE = 1.0
"""Seconds between looks for a free GPU."""


@contextmanager
def leased(device: str) -> Iterator[str]:
    """Lease a device of this worker's own: ``cuda:2`` for ``cuda`` on a machine of several GPUs.

    The lease ends with the process, however that ends.
    """
    count = torch.cuda.device_count() if device == "cuda" else 0
    if count < 2:
        yield device
        return
    folder = cache.root() / "gpus"
    folder.mkdir(exist_ok=True)
    for number in itertools.cycle(range(count)):
        lock = FileLock(folder / f"{number}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if number == count - 1:
                time.sleep(PATIENCE)
            continue
        try:
            yield f"cuda:{number}"
        finally:
            lock.release()
        return
