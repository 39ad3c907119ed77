"""Writes the report of any folder of results: README.md, plots and tables."""

from __future__ import annotations

from pathlib import Path

from resting.benchmarks.report import folder as folders
from resting.benchmarks.report import latency_tables, sections


def write(folder: Path, plots: bool = True) -> None:
    """Write README.md, plots and tables into `folder`, from what a run left in it.

    Parameters
    ----------
    folder : Path
    plots : bool
        Whether plots are drawn, which takes a minute or two for a large suite of times.

    Raises
    ------
    BenchmarkError
        If files are missing or damaged; the message says which, and what belongs there.
    """
    with folders.named(folder):
        if (folder / "decode.csv").exists():
            latency_tables.write(folder, plots)
        else:
            sections.write(folder)
