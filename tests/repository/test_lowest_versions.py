"""The lowest versions that pyproject.toml allows can be installed together, as far as the installed ones tell."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]


def lowest():
    done = subprocess.run(
        [sys.executable, ROOT / ".ci" / "lowest", "--print"], capture_output=True, text=True, check=True
    )
    found = (line.partition("==") for line in done.stdout.split())
    return {canonicalize_name(name): Version(version) for name, _, version in found}


def test_the_lowest_version_of_a_package_takes_the_lowest_of_those_it_needs():
    floors, looked = lowest(), []
    for name, floor in floors.items():
        try:
            installed = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if Version(installed.version).release[: len(floor.release)] != floor.release:
            continue  # what the lowest version needs is not known here
        looked.append(name)
        for line in installed.requires or []:
            needed = Requirement(line)
            other = canonicalize_name(needed.name)
            if other in floors and (needed.marker is None or needed.marker.evaluate({"extra": ""})):
                assert floors[other] in needed.specifier, (
                    f"{name} {floor} needs {line}, and {other} may be {floors[other]}"
                )
    if "transformers" not in looked:  # the versions of constraints.txt have it
        pytest.skip("a later transformers is installed")
