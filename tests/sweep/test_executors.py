"""Executors, shards and orders of one sweep give the same values; workers are processes of their own."""

from __future__ import annotations

import pandas as pd
import pytest
import tiny

from resting.benchmarks import run
from resting.benchmarks.cells import suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.progress import Console
from resting.benchmarks.sweep.execution import Execution
from resting.benchmarks.sweep.merge import merge
from resting.benchmarks.sweep.mode import ExecutorName, Mode
from resting.benchmarks.sweep.store import Store

pytestmark = pytest.mark.real


def values(folder):
    return pd.read_csv(folder / "results.csv").to_csv(index=False)


def test_executors_shards_and_orders_give_the_same_values(tmp_path, fresh_cells):
    (tmp_path / "tiny.toml").write_text(tiny.REAL_TEXTS)  # dense and TEAL
    loaded = suite_file.load(str(tmp_path / "tiny.toml"))
    model = str(tiny.model_folder(tmp_path / "model", tiny.ENGLISH))
    found = {}
    for name, how in {
        "serial": Execution(),
        "processes": Execution(executor=ExecutorName.PROCESSES, workers=2),
        "submitit": Execution(executor=ExecutorName.SUBMITIT, workers=1),
        "ray": Execution(executor=ExecutorName.RAY, workers=1),
    }.items():
        fresh_cells(name)
        found[name] = values(run.run(loaded, Options(tmp_path / f"out-{name}", model), Console(quiet=True), how))
    assert found["processes"] == found["serial"]
    assert found["submitit"] == found["serial"]
    assert found["ray"] == found["serial"]
    for part in (2, 1):  # the later methods first, each on a machine of its own
        fresh_cells(f"part-{part}")
        folder = run.run(loaded, Options(tmp_path / "parts", model), Console(quiet=True), Execution(shard=(part, 2)))
        assert not (folder / "results.csv").exists()
    merged = merge(Store.default(), [tmp_path / "part-2"])
    assert not merged.conflicts
    folder = run.run(loaded, Options(tmp_path / "parts", model), Console(quiet=True), Execution(mode=Mode.ONLY_CACHE))
    assert values(folder) == found["serial"]
