"""What a built wheel holds: all of the five folders and nothing else."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("resting", "sparsifier", "baselines", "method", "benchmarks")
LEFT_OUT = ("benchmarks/micro/",)
"""Benchmarks of a checkout's own kernels: run by pytest, not by users."""


def sources() -> dict[str, str]:
    """Every file of the five folders, by the name that an installation gives it."""
    found = {}
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            name = path.relative_to(ROOT).as_posix()
            if path.is_file() and "__pycache__" not in path.parts and not name.startswith(LEFT_OUT):
                found[name if folder == "resting" else f"resting/{name}"] = name
    return found


def test_every_file_of_the_five_folders_is_in_it(wheel_names):
    assert {name for name in wheel_names if name.startswith("resting/")} == set(sources())


@pytest.mark.parametrize(
    "pattern",
    [
        "resting/py.typed",
        "resting/benchmarks/suites/*.toml",
        "resting/benchmarks/assets/shapes.toml",
        "resting/benchmarks/assets/core.txt",
        "resting/benchmarks/page/*.j2",
        "resting/benchmarks/page/*.js",
        "resting/benchmarks/page/*.css",
        "resting/benchmarks/cli/templates/*.tmpl",
        "resting/sparsifier/decoding/*.py",
        "resting/method/*.py",
    ],
)
def test_what_is_no_code_is_in_it_too(wheel_names, pattern):
    assert any(Path(name).match(pattern) for name in wheel_names)


def test_the_only_top_level_names_are_resting_and_its_metadata(wheel_names):
    (version,) = {name.split("/")[0] for name in wheel_names if not name.startswith("resting/")}
    assert version.startswith("resting_neurons-")
    assert version.endswith(".dist-info")


def test_packages_of_pyproject_are_the_folders_with_code():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {str(Path(name).parent).replace("/", ".") for name in sources() if name.endswith(".py")}
    assert sorted(listed) == sorted(folders)
