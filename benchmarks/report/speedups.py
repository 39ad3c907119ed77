"""Draws the spread of measured speeds from single steps, and names what a speed was measured in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.quality import intervals
from resting.benchmarks.quality.intervals import FEWEST

Key = tuple[str, str, int, str, float]
"""Model, dtype, threads, method and target."""


def samples(folder: Path) -> dict[Key, np.ndarray]:
    """Draw bootstrap samples of the decode speeds of a folder over dense, by `Key`.

    Dense and sparse steps are drawn together, since they were taken in turn. The spread between runs is not in them.

    Raises
    ------
    BenchmarkError
        If decode-raw.parquet is damaged; where there is none, nothing is returned.
    """
    file = folder / "decode-raw.parquet"
    if not file.exists():
        return {}
    try:
        frame = pd.read_parquet(file)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{file} cannot be read: {error}") from error
    if not {"raw_dense", "raw_sparse", "speedup"} <= set(frame):
        return {}
    out: dict[Key, np.ndarray] = {}
    random = np.random.default_rng(0)
    for row in frame[frame.speedup.notna()].itertuples():
        dense, sparse = np.asarray(row.raw_dense), np.asarray(row.raw_sparse)
        if len(dense) != len(sparse) or len(dense) < FEWEST:
            continue
        drawn = intervals.drawn(len(dense), random)
        ratio = np.quantile(dense[drawn], 0.2, axis=1) / np.quantile(sparse[drawn], 0.2, axis=1)
        out[row.model, row.dtype, int(row.threads), row.method, float(row.target)] = ratio
    return out


def timed_in(dtype: str, threads: int, machine: dict[str, Any]) -> str:
    """Name what a row was timed in: ``float32, 2 CPU threads``, or ``bfloat16, NVIDIA H100``."""
    device = str(machine.get("device", "cpu"))
    if device != "cpu":
        return f"{dtype}, {device}"
    return f"{dtype}, {threads} CPU thread{'s' if threads != 1 else ''}"
