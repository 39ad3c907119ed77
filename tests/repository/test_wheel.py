"""What a built wheel holds, all of the five folders and nothing else; and what is published beside it."""

from __future__ import annotations

import runpy
import subprocess
import tarfile
import tomllib
import zipfile
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


def test_the_source_distribution_has_what_a_reader_needs(sdist_file):
    with tarfile.open(sdist_file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml", "constraints.txt"} <= names


def test_the_installed_wheel_runs(installed, tmp_path):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    command = [installed.parent / "resting", "--version"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"resting-neurons {version}", done.stderr


def test_metadata_name_python_licence_and_urls(wheel_file):
    with zipfile.ZipFile(wheel_file) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = archive.read(name).decode()
    for line in ("Name: resting-neurons", "Requires-Python: >=3.11", "License-Expression: Apache-2.0"):
        assert f"{line}\n" in metadata
    assert "\nProject-URL: " in metadata
    assert "\n# Resting neurons\n" in metadata


def test_the_changelog_begins_with_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    first = next(line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## "))
    release, _, development = version.partition(".dev")
    assert first == (f"## {release}, unreleased" if development else f"## {release}")


def test_what_a_release_changes():
    published = runpy.run_path(str(ROOT / ".ci" / "published"))
    project = tomllib.loads(published["urls"]((ROOT / "pyproject.toml").read_text(), "https://host/a/b"))["project"]
    assert project["urls"]["Repository"] == "https://host/a/b"
    assert len(project["urls"]) >= 5
    text = "![A picture](results/a.png), [docs](docs/cli.md), [a](https://b/c.md), [here](#there)"
    assert published["links"](text, "https://host/a/b", "v1") == (
        "![A picture](https://host/a/b/raw/v1/results/a.png), [docs](https://host/a/b/blob/v1/docs/cli.md), "
        "[a](https://b/c.md), [here](#there)"
    )
    readme = published["links"]((ROOT / "README.md").read_text(), "https://host/a/b", "v1")
    assert "](results/" not in readme
    assert "](docs/" not in readme
