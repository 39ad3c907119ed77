"""Code that is changed while a process runs with it: no number is kept under the key of the new one."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
from typer.testing import CliRunner

from resting.benchmarks import cache
from resting.benchmarks.assets import models
from resting.benchmarks.cells import code, expand, identity, suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cli.main import app
from resting.benchmarks.progress import Console
from resting.benchmarks.sweep import jobs
from resting.benchmarks.sweep.mode import Mode
from resting.benchmarks.sweep.store import Store

METHOD = """
from pathlib import Path
from resting import Rule, Sparsifier


class Edited(Sparsifier):
    '''Magnitude thresholds; somebody edits the file while it is fitted.'''

    name = "{name}"

    def rule(self, site, statistics, ratio):
        {edit}
        return Rule(threshold=statistics[site].quantile(ratio))
"""
EDIT = 'Path(__file__).write_text(Path(__file__).read_text().replace("quantile(ratio)", "quantile(0.9 * ratio)"))'


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    monkeypatch.setattr(code, "_first", {})


def run(tmp_path: Path, monkeypatch, name: str, edit: str):
    tiny.provide_texts(monkeypatch)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    (tmp_path / f"{name}.py").write_text(METHOD.format(name=name.replace("_", "-"), edit=edit))
    folder = tiny.model_folder(tmp_path / "model")
    asked = ["run", "mine.toml", "--model", str(folder), "--method", f"{name}:Edited", "--output", str(tmp_path / "r")]
    return CliRunner().invoke(app, asked)


def kept(room: str) -> list[str]:
    """What the store holds of the method, by name."""
    files = (cache.root() / room).rglob("*.json")
    return [file.name for file in files if "edited" in file.read_text()]


def test_a_method_that_is_edited_while_it_is_fitted_leaves_nothing_under_its_new_key(tmp_path, monkeypatch):
    done = run(tmp_path, monkeypatch, "edited_now", EDIT)
    assert isinstance(done.exception, code.CodeChangedError)
    assert done.exception.code == 2
    assert "edited_now.py was changed while this process runs" in str(done.exception)
    assert kept("cells") == []
    assert kept("plans") == []
    finished = [json.loads(file.read_text())["status"] for file in (cache.root() / "cells").glob("*.json")]
    assert finished == ["done", "done"]  # dense and teal came before


def test_one_that_stays_as_it_is_is_kept(tmp_path, monkeypatch):
    done = run(tmp_path, monkeypatch, "edited_never", "pass")
    assert done.exit_code == 0, done.output
    assert len(kept("cells")) == 1
    assert kept("plans")


def test_a_file_that_was_loaded_again_is_another_one(tmp_path, monkeypatch):
    file = tmp_path / "edited_and_loaded.py"
    file.write_text("X = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("edited_and_loaded")
    code.note({"edited_and_loaded": file})
    file.write_text("X = 22\n")
    code.note({"edited_and_loaded": file})
    with pytest.raises(code.CodeChangedError, match="was changed while"):
        code.check_unchanged()
    importlib.reload(module)
    code.note({"edited_and_loaded": file})
    code.check_unchanged()
    file.unlink()
    with pytest.raises(code.CodeChangedError):
        code.check_unchanged()
    del sys.modules["edited_and_loaded"]


def test_what_measures_is_looked_at_too(tmp_path, monkeypatch):
    file = tmp_path / "masking.py"
    file.write_text("X = 1\n")
    monkeypatch.setattr(identity, "measuring_code", lambda: {"sparsifier/masking.py": file})
    for asked in (lambda: identity.shared_version(None), identity.tasks_version):
        monkeypatch.setattr(code, "_first", {})
        asked()
        code.check_unchanged()
        file.write_text(file.read_text() + "Y = 1\n")
        with pytest.raises(code.CodeChangedError):
            code.check_unchanged()


@pytest.fixture
def job(tmp_path, monkeypatch) -> jobs.Job:
    tiny.provide_texts(monkeypatch)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    suite = suite_file.load(str(tmp_path / "mine.toml"))
    source = models.resolve(str(tiny.model_folder(tmp_path / "model")))
    return jobs.jobs_of(suite, expand.cells_of(suite), Options(tmp_path / "r"), [source], {}, Mode.ONLY_MISSING)[-1]


@pytest.mark.parametrize("what", ["code", "packages", "device"])
def test_a_worker_with_another_code_or_other_packages_refuses_a_job(job, what):
    if what == "code":
        elsewhere = replace(job, cells=(("0" * 64, job.cells[0][1]),))
    else:
        other = {"torch": "2.6.0"} if what == "packages" else "cuda"
        elsewhere = replace(job, setting=job.setting | {what: other})
    with pytest.raises(code.CodeChangedError, match=f"{what} is "):
        list(jobs.Worker(Console(quiet=True)).results(elsewhere))
    assert list(Store.default().keys()) == []
    assert jobs.run_job(job) == [key for key, _ in job.cells]


def test_sets_are_the_same_text_in_every_process():
    assert code.as_text({"missing": {"b", "a"}}) == '{"missing": ["a", "b"]}'
