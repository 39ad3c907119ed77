"""The micro-benchmarks run, save a small file, and the guard reads its ratios from it."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from resting.benchmarks.checks.guard import speed

pytestmark = pytest.mark.alone
MICRO = Path(__file__).parents[2] / "benchmarks" / "micro"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a run of some of the cases saves."""
    file = tmp_path_factory.mktemp("micro") / "run.json"
    cases = "(2048x2048 and float32) or store"
    command = [sys.executable, "-m", "pytest", str(MICRO), "-p", "no:cacheprovider", "-k", cases]
    command += [f"--benchmark-json={file}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return file


def test_the_guard_reads_its_ratios_from_a_run(saved):
    found = speed.read(saved)
    assert found.keys() == speed.RATIOS.keys()
    assert all(ratio > 1.5 for ratio in found.values())


def test_cases_of_a_kernel_say_what_they_read_and_how_near_the_limit_they_come(saved):
    cases = {case["name"]: case for case in json.loads(saved.read_text())["benchmarks"]}
    of = {case["extra_info"]["product"]: case for name, case in cases.items() if name.startswith("bench_product")}
    assert of.keys() == {"linear", "columns 0", "columns 0.5", "columns 0.9", "rows 0.5"}
    dense = min(of[name]["stats"]["q1"] for name in ("linear", "columns 0"))
    for product, case in of.items():
        info, read = case["extra_info"], {"columns 0.5": 0.5, "columns 0.9": 0.1, "rows 0.5": 0.5}.get(product, 1.0)
        assert info["bytes"] == pytest.approx(read * 2048 * 2048 * 4, rel=0.01)
        share = dense / case["stats"]["q1"] * info["bytes"] / (2048 * 2048 * 4)
        assert info["share_of_limit"] == pytest.approx(share, abs=1e-3)


def test_a_saved_run_is_small_and_does_not_name_the_machine(saved):
    facts = json.loads(saved.read_text())
    assert facts["machine_info"]["measured_on"]["packages"]["torch"]
    assert "node" not in facts["machine_info"]
    assert platform.node() not in json.dumps(facts["machine_info"]).split('"')
    assert facts["commit_info"].keys() <= {"id", "time", "dirty"}
    assert not any("data" in case["stats"] for case in facts["benchmarks"])
