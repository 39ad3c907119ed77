"""Jobs: what travels to a worker, and what a worker keeps."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tiny

from resting.benchmarks.assets import models
from resting.benchmarks.cells import expand, suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.progress import Console
from resting.benchmarks.sweep import jobs
from resting.benchmarks.sweep.mode import Mode
from resting.benchmarks.sweep.store import Store

CODE = """
from transformers import LlamaForCausalLM


class Mine(LlamaForCausalLM):
    pass
"""


@pytest.fixture
def suite(tmp_path, monkeypatch):
    tiny.provide_texts(monkeypatch)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    return suite_file.load(str(tmp_path / "mine.toml"))


def made(suite, source, trusted=False, output=Path("results")):
    options = Options(output, trusted=trusted)
    return jobs.jobs_of(suite, expand.cells_of(suite), options, [source], {}, Mode.ONLY_MISSING)


def test_trust_travels_with_a_job(suite, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tiny.model_folder(tmp_path / "model")
    (folder / "modeling_mine.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    job = made(suite, models.resolve(str(folder), trusted=True), trusted=True)[0]
    elsewhere = pickle.loads(pickle.dumps(job))  # as it comes to another process
    assert jobs.run_job(elsewhere) == [key for key, _ in job.cells]
    assert Store.default().finished(job.cells[0][0]).status == "done"


def test_cells_are_expanded_once_and_keep_their_keys(suite, tmp_path):
    source = models.resolve(str(tiny.model_folder(tmp_path / "model")))
    found = made(suite, source)
    assert [job.label for job in found] == ["dense", "teal"]
    assert [cell for job in found for _, cell in job.cells] == expand.cells_of(suite)
    again = [key for job in made(suite, source) for key, _ in job.cells]
    assert again == [key for job in found for key, _ in job.cells]


def test_a_worker_loads_a_model_once_for_all_its_jobs(suite, tmp_path, monkeypatch):
    source = models.resolve(str(tiny.model_folder(tmp_path / "model")))
    loads = []
    load = models.ModelSource.load
    monkeypatch.setattr(models.ModelSource, "load", lambda *args: loads.append(args) or load(*args))
    worker = jobs.Worker(Console(quiet=True))
    results = [result for job in made(suite, source) for _, _, result, _ in worker.results(job)]
    assert [result.status for result in results] == ["done", "done"]
    assert len(loads) == 1
    assert ["masked_over_dense" in result.info for result in results] == [False, True]  # what masks cost, once a run


def test_only_cells_of_trained_methods_are_parted(suite, tmp_path):
    text = tiny.SUITE.replace("[0.5]", "[0.4, 0.5]") + '[[methods]]\nname = "mean-error(teal)"\n'
    (tmp_path / "more.toml").write_text(text)
    found = made(suite_file.load(str(tmp_path / "more.toml")), models.resolve(str(tiny.model_folder(tmp_path / "m"))))
    assert [(job.label, [len(part.cells) for part in job.parts()]) for job in found] == [
        ("dense", [1]),
        ("teal", [2]),
        ("mean-error(teal)", [1, 1]),
    ]
    for job in found:
        assert tuple(cell for part in job.parts() for cell in part.cells) == job.cells


def test_cells_that_share_a_training_stay_together(suite, tmp_path):
    text = tiny.SUITE.replace("[0.5]", "[0.4, 0.5]") + (
        '[[methods]]\nname = "spon(teal)"\nseeds = [0, 1]\n'
        '[[policies]]\npolicy = "last-fraction"\nfraction = 0.5\ntargets = [0.5, 0.6]\n'
    )
    (tmp_path / "more.toml").write_text(text)
    found = made(suite_file.load(str(tmp_path / "more.toml")), models.resolve(str(tiny.model_folder(tmp_path / "m"))))
    spon = next(job for job in found if job.label == "spon(teal)")
    parts = spon.parts()
    assert sorted(key for part in parts for key, _ in part.cells) == sorted(key for key, _ in spon.cells)
    trainings = [{(cell.target, cell.seed) for _, cell in part.cells} for part in parts]
    assert sorted(map(tuple, trainings)) == [((t, s),) for t in (0.4, 0.5, 0.6) for s in (0, 1)]
    assert [len(part.cells) for part in parts] == [1, 1, 2, 2, 1, 1]


def test_a_process_that_stays_keeps_its_model(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_kept", [])
    loads = []
    real = models.ModelSource.load
    monkeypatch.setattr(models.ModelSource, "load", lambda self, *a: loads.append(1) or real(self, *a))
    for job in made(suite, models.resolve(str(tiny.model_folder(tmp_path / "model")))):
        assert jobs.run_job_and_keep(job) == [key for key, _ in job.cells]
    assert len(loads) == 1
