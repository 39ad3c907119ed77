"""Writes a report: its README.md, and its tables as LaTeX and CSV for papers and spreadsheets."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from resting.benchmarks import cache
from resting.benchmarks.names import slug
from resting.benchmarks.report.table import Part, Table


def write(folder: Path, parts: Sequence[Part]) -> None:
    """Write README.md, and every table among `parts` into ``folder/tables``, which holds nothing else."""
    text = "\n\n".join(part.markdown() if isinstance(part, Table) else part for part in parts)
    cache.write_whole(folder / "README.md", text + "\n")
    inner = folder / "tables"
    shutil.rmtree(inner, ignore_errors=True)
    for number, table in enumerate((part for part in parts if isinstance(part, Table)), 1):
        name = f"{number:02}-{slug(table.title)[:48].strip('-')}"
        cache.write_whole(inner / f"{name}.tex", table.latex())
        cache.write_whole(inner / f"{name}.csv", table.csv())
