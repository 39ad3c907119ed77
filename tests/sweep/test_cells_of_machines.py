"""A finished cell serves on another GPU, as quality does, and its times stay those of the machine that took them."""

from __future__ import annotations

import json

import pytest
import tiny

from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.cli import time_estimate
from resting.benchmarks.latency.run import LatencyRun
from resting.benchmarks.progress import Console
from resting.benchmarks.sweep.store import Store

H100 = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def measured_on_h100(here, monkeypatch):
    """A suite whose cells another machine has measured."""
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 0
    for path in Store.default().folder.glob("*.json"):
        content = json.loads(path.read_text())
        content["measured_on"] |= {"device": H100, "cores": 77}
        if any(row["method"] == "teal" for row in content["rows"]):
            content["info"]["masked_over_dense"] = 1.25
        path.write_text(json.dumps(content))
    return here


def test_reused_cells_name_the_machine_that_measured_them(measured_on_h100, monkeypatch):
    here = measured_on_h100
    (here / "mine.toml").write_text(tiny.SUITE + '[[methods]]\nname = "wina"\n')
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 0
    facts = json.loads((here / "results/mine-model/provenance.json").read_text())
    by_method = {cell["method"]: facts["machines"][cell["measured_on"]]["device"] for cell in facts["cells"]}
    assert by_method == {"dense": H100, "teal": H100, "wina": "cpu"}
    said = (here / "results/mine-model/README.md").read_text()
    assert f" on {H100} (77 cores" in said
    assert f"A masked forward costs 1.25 (on {H100}), " in said  # and another figure for this machine


def test_times_of_one_machine_are_said_as_before(here, monkeypatch):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model") == 0
    said = (here / "results/mine-model/README.md").read_text()
    assert " times a dense one (median of interleaved runs)." in said
    assert "(on " not in said


def test_an_estimate_names_the_processor_of_the_times(measured_on_h100, monkeypatch, capsys):
    known = time_estimate.Known.of_store(Store.default())
    assert {processor for times in known.seconds.values() for *_, processor in times} == {H100}
    (measured_on_h100 / "other.toml").write_text(tiny.SUITE.replace("windows = 3", "windows = 5"))
    arguments = ["run", "other.toml", "--model", "a/model", "--dry-run"]
    capsys.readouterr()
    assert tiny.resting(monkeypatch, *arguments) == 0
    assert "unknown for 2: no such cell was measured yet" in capsys.readouterr().out  # on a CPU
    for path in Store.default().folder.glob("*.json"):
        content = json.loads(path.read_text())
        content["measured_on"] |= {"device": "cpu", "cpu": "an old processor"}
        path.write_text(json.dumps(content))
    assert tiny.resting(monkeypatch, *arguments) == 0
    assert "for 2 cells, as such cells took before, on an old processor" in capsys.readouterr().out


def test_times_are_never_taken_from_the_store(tmp_path, monkeypatch):
    """Whatever is there: a suite of times neither reads nor writes finished cells."""

    def touched(*_):
        raise AssertionError("the store of finished cells")

    for name in ("default", "load", "save", "finished"):
        monkeypatch.setattr(Store, name, touched)
    suite = tiny.TINY_LATENCY | {"targets": [0.5], "methods": [{"name": "dense"}, {"name": "teal"}]}
    suite["latency"] = {"prompt": 8, "decoded_tokens": 8, "generate": False}
    suite["latency"]["cpu"] = {"models": ["tiny"], "matrices": [], "dense_paths": ["kernels"]}
    LatencyRun(Suite.model_validate(suite), Options(tmp_path), Console(quiet=True)).run()
