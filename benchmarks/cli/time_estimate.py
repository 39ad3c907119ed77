"""Estimates how long cells will take, by how long such cells took before."""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.identity import kind_of
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.names import of_weights
from resting.benchmarks.progress import duration
from resting.benchmarks.sweep.store import FINISHED, Store

NEWEST = 3000
"""Cells of the store that are looked at, the newest first."""
Kind = tuple[str, str, str, str, tuple[str, ...]]
"""Of a cell: weights, method, dtype, kind of device, and the tasks that were asked."""


@dataclass
class Known:
    """Holds how long cells took.

    Attributes
    ----------
    seconds : mapping
        By kind: the tokens that were scored, the seconds that it took, and the processor.
    """

    seconds: dict[Kind, list[tuple[int, float, str]]] = field(default_factory=lambda: defaultdict(list))

    @classmethod
    def of_store(cls, store: Store) -> Known:
        """Read what the cells of a store took, on this machine or on those that share it."""
        found = cls()
        paths = sorted(store.folder.glob("*.json"), key=lambda path: -path.stat().st_mtime)[:NEWEST]
        for path in paths:
            result = store.load(path.stem)
            if result is not None and result.status in FINISHED and result.rows and result.seconds > 0:
                found.add(result.rows, result.measured_on, result.seconds)
        return found

    @classmethod
    def of_folder(cls, folder: Path) -> Known:
        """Read what the cells of a results folder took, on the machine where they were measured."""
        import pandas as pd

        found = cls()
        try:
            facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
            rows = pd.read_csv(folder / "results.csv", dtype={"weights": str})
            keys = ["model", "method", "target", "seed", "tokens"]
            by_cell = {tuple(map(str, key)): part for key, part in rows.groupby(keys)}
            for cell in facts["cells"]:
                part = by_cell.get(tuple(str(cell[key]) for key in keys))
                if part is not None and cell["status"] in FINISHED and cell["seconds"] > 0:
                    machine = facts["machines"][cell["measured_on"]]
                    found.add(part.to_dict("records"), machine, cell["seconds"])
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return found  # it is a guess: what cannot be read gives none
        return found

    def add(self, rows: Iterable[Mapping[str, Any]], machine: Mapping[str, Any], seconds: float) -> None:
        """Note what a cell took that gave these rows, on a machine as provenance describes it."""
        processor = machine.get("device", "cpu")
        device = "cpu" if processor == "cpu" else "cuda"
        processor = str(machine.get("cpu", "an unknown processor") if device == "cpu" else processor)
        rows = list(rows)
        first = rows[0]
        scored = [row for row in rows if str(row["metric"]).endswith("_perplexity") and row.get("n")]
        size = sum(int(row["n"]) for row in scored if row["n"] == row["n"])
        tasks = tuple(sorted({str(row["dataset"]) for row in rows if "/" in str(row["metric"])}))
        kind = (str(first["weights"]), str(first["method"]), str(first["dtype"]), device, tasks)
        self.seconds[kind].append((size, float(seconds), processor))

    def estimate(self, cell: Cell, suite: Suite, weights: str, device: str) -> tuple[float, set[str]] | None:
        """Estimate the seconds of a cell by those of its kind: the more text, the longer; None where there are none.

        Beside them stand the processors that they were measured on, of which there may be several.
        """
        tasks = tuple(sorted(suite.task_names))
        found = self.seconds.get((weights, cell.label, suite.dtype, kind_of(device), tasks))
        if not found:
            return None
        evaluation = suite.evaluation
        size = (evaluation.windows or 0) * evaluation.window * len(evaluation.texts)
        taken = [s * max(1.0, size / before) if size and before else s for before, s, _ in found]
        return statistics.median(taken), {processor for *_, processor in found}


def line(suite: Suite, cells: list[tuple[str | None, Cell]], sha256: str, device: str, output: Path) -> str:
    """Say about how long the cells of one model will take.

    Parameters
    ----------
    suite : Suite
    cells : list of (str or None, Cell)
        With their keys; None where a key is not known before texts are read.
    sha256 : str
        Of the model's weights.
    device : str
    output : Path
        Folder of results folders: what this store has not measured, those of the suite may have.
    """
    store = Store.default()
    waiting = [cell for key, cell in cells if key is None or store.finished(key) is None]
    if not waiting:
        return "time: none, all cells are measured already"
    names = dict.fromkeys([suite.name, str(suite.changed.get("suite", suite.name))])
    known = {"": Known.of_store(store)} | {str(output / name): Known.of_folder(output / name) for name in names}
    weights = of_weights(sha256)
    found: dict[str, list[float]] = {where: [] for where in known}
    processors: dict[str, set[str]] = {where: set() for where in known}
    for cell in waiting:
        for where, one in known.items():
            if (estimated := one.estimate(cell, suite, weights, device)) is not None:
                found[where].append(estimated[0])
                processors[where] |= estimated[1]
                break
    said = []
    for where, times in found.items():
        if times:
            like = f"as in {where}" if where else "as such cells took before"
            on = " and ".join(sorted(processors[where]))
            said.append(f"about {duration(sum(times))} for {len(times)} cells, {like}, on {on}")
    if lacking := len(waiting) - sum(map(len, found.values())):
        said.append(f"unknown for {lacking}: no such cell was measured yet")
    if done := len(cells) - len(waiting):
        said.append(f"none for {done} that are measured already")
    return f"time: {'; '.join(said)}"
