"""Sweeps from a suite to a results folder: what fails is listed, and what is committed can be verified."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import tiny

from resting.benchmarks import run
from resting.benchmarks.cells import suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.checks import compare, verify
from resting.benchmarks.errors import BenchmarkError, FailedCells
from resting.benchmarks.progress import Console

pytestmark = pytest.mark.real


@pytest.fixture
def loaded(tmp_path):
    (tmp_path / "tiny.toml").write_text(tiny.REAL_TEXTS + '[[methods]]\nname = "mean-error(teal)"\n')
    return suite_file.load(str(tmp_path / "tiny.toml"))


@pytest.fixture
def model(tmp_path):
    return str(tiny.model_folder(tmp_path / "model", tiny.ENGLISH))


def test_a_failing_method_is_listed_and_the_others_are_there(tmp_path, fresh_cells, loaded, model, monkeypatch):
    from resting.baselines.teal import Teal

    fresh_cells("failing")

    def fails(self, *_):
        raise RuntimeError("a kernel that is not there")

    monkeypatch.setattr(Teal, "fit_calibrated", fails)
    with pytest.raises(
        FailedCells, match=r"(?s)2 of 3 cells have no result.*teal at 0\.5: failed, RuntimeError: a kernel"
    ):
        run.run(loaded, Options(tmp_path / "out", model), Console(quiet=True))
    (found,) = (tmp_path / "out").glob("*/results.csv")
    rows = pd.read_csv(found)
    assert rows[rows.method == "dense"].value.notna().all()
    assert (rows[rows.method == "teal"].reason == "failed: RuntimeError: a kernel that is not there").all()
    monkeypatch.undo()
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "failing"))
    folder = run.run(loaded, Options(tmp_path / "out", model), Console(quiet=True))
    assert pd.read_csv(folder / "results.csv").value.notna().all()


def test_committed_rows_are_verified_and_compared(tmp_path, fresh_cells, loaded, model):
    fresh_cells("verified")
    folder = run.run(loaded, Options(tmp_path / "out", model), Console(quiet=True))
    same = verify.verify(folder, Options(tmp_path, model), 3, 0, 0.0, Console(quiet=True))
    assert same
    assert all(one.agrees for one in same)
    rows = pd.read_csv(folder / "results.csv")
    other = tmp_path / "other"
    other.mkdir()
    rows.assign(value=rows.value * 1.1).to_csv(other / "results.csv", index=False)
    (other / "provenance.json").write_text((folder / "provenance.json").read_text())
    assert not all(
        one.agrees for one in verify.verify(other, Options(tmp_path, model), 3, 0, 0.01, Console(quiet=True))
    )
    assert not compare.compare(folder, folder).changed.any()
    assert "Nothing changed" in compare.text(compare.compare(folder, folder))
    assert compare.compare(folder, other).difference.abs().max() > 0.05
    assert "paired, 3 windows" in set(compare.compare(folder, folder).how)
    facts = json.loads((folder / "provenance.json").read_text())
    facts["suite"]["evaluation"]["windows"] = 64  # other windows are not paired, whatever their numbers
    shutil.copy(folder / "windows.parquet", other)
    (other / "provenance.json").write_text(json.dumps(facts))
    assert "paired, 3 windows" not in set(compare.compare(folder, other).how)
    rows[rows.method == "teal"].to_csv(other / "results.csv", index=False)
    assert compare.only_in(folder, other) == (len(rows) - (rows.method == "teal").sum(), 0)
    rows.assign(method="x").to_csv(other / "results.csv", index=False)
    with pytest.raises(BenchmarkError, match="no row in common"):
        compare.compare(folder, other)
    with pytest.raises(BenchmarkError, match=r"results\.csv cannot be read"):
        compare.compare(folder, tmp_path)
    with pytest.raises(BenchmarkError, match="cannot be verified"):
        verify.verify(tmp_path, Options(tmp_path, model), 1, 0, 0.0, Console(quiet=True))
