"""What a run of times has measured so far, and its folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks import cache

Row = dict[str, Any]


@dataclass
class Record:
    """Keeps rows and facts, written as they come: what is measured is not lost when a later part is stopped.

    Attributes
    ----------
    folder : Path
    facts : dict
        Suite, machine, and under ``dense_paths`` what the dense paths took.
    matrices, quantised, decode : list of dict
        Rows of the tables, the second written only where it has some; keys that begin with ``raw`` hold all values.
    """

    folder: Path
    facts: Row
    matrices: list[Row] = field(default_factory=list)
    quantised: list[Row] = field(default_factory=list)
    decode: list[Row] = field(default_factory=list)

    @property
    def has_rows(self) -> bool:
        """Tells whether anything was measured."""
        return bool(self.matrices or self.quantised or self.decode)

    def save(self) -> None:
        """Write tables as CSV, raw values as Parquet, provenance as JSON."""
        self.folder.mkdir(parents=True, exist_ok=True)
        tables = {"matrices": self.matrices, "decode": self.decode}
        if self.quantised:
            tables["quantised"] = self.quantised
        else:  # of an earlier run, whose report would be taken for this one's
            for name in ("quantised.csv", "quantised-raw.parquet"):
                (self.folder / name).unlink(missing_ok=True)
        for name, rows in tables.items():
            frame = pd.DataFrame(rows)
            raw = [c for c in frame.columns if c.startswith("raw")]
            frame.drop(columns=raw).to_csv(self.folder / f"{name}.csv", index=False, float_format="%.6g")
            if rows:
                frame.to_parquet(self.folder / f"{name}-raw.parquet", index=False, compression="zstd")
        cache.write_whole(self.folder / "provenance.json", cache.as_json(self.facts, 1) + "\n")
