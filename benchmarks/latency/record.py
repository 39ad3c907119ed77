"""What a run of times has measured so far, and its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks import cache
from resting.benchmarks.report import latency_tables

Row = dict[str, Any]


@dataclass
class Record:
    """Rows and facts, written as they come: what is measured is not lost when a later part is stopped.

    Attributes
    ----------
    folder : Path
    facts : dict
        Suite, machine, and under ``dense_paths`` what the dense ways took.
    matrices, decode : list of dict
        Rows of the two tables; keys that begin with ``raw`` hold all values.
    """

    folder: Path
    facts: Row
    matrices: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)

    def save(self) -> None:
        """Tables as CSV, raw values as Parquet, provenance as JSON."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, rows in (("matrices", self.matrices), ("decode", self.decode)):
            frame = pd.DataFrame(rows)
            raw = [c for c in frame.columns if c.startswith("raw")]
            frame.drop(columns=raw).to_csv(self.folder / f"{name}.csv", index=False, float_format="%.6g")
            if rows:
                frame.to_parquet(self.folder / f"{name}-raw.parquet", index=False, compression="zstd")
        cache.write_whole(self.folder / "provenance.json", json.dumps(self.facts, indent=1, default=str) + "\n")

    def finish(self) -> None:
        """Save, and write the report."""
        self.save()
        latency_tables.write(self.folder)
