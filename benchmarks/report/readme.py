"""Writes the report of any folder of results: README.md, plots and tables."""

from __future__ import annotations

from pathlib import Path

from resting.benchmarks.report import folder as folders
from resting.benchmarks.report import latency_tables, sections


def write(folder: Path) -> None:
    """Write README.md, plots and tables into `folder`, from what a run left in it.

    Raises
    ------
    BenchmarkError
        If files are missing or damaged; the message says which, and what belongs there.
    """
    with folders.named(folder):
        (latency_tables if (folder / "decode.csv").exists() else sections).write(folder)
