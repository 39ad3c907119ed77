"""Makes the saved JSON small and says on what it was measured."""

from __future__ import annotations

from typing import Any

from resting.benchmarks import provenance

CPU = ("brand_raw", "arch", "count", "l2_cache_size", "l3_cache_size")
COMMIT = ("id", "time", "dirty")
CHANGES = ("date", "git")
"""What differs between two runs on one machine: `compare` warns where two machines are not the same."""


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Keep what times depend on, and leave out the name of the machine."""
    for name in ("node", "release"):
        machine_info.pop(name, None)
    cpu = machine_info.get("cpu", {})
    machine_info["cpu"] = {name: cpu[name] for name in CPU if name in cpu}
    facts = provenance.collect("cpu")
    machine_info["measured_on"] = {name: value for name, value in facts.items() if name not in CHANGES}


def pytest_benchmark_update_json(config: Any, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    """Keep statistics, and not the time of every round or the options of every case."""
    commit = output_json["commit_info"]
    output_json["commit_info"] = {name: commit[name] for name in COMMIT if name in commit}
    for case in output_json["benchmarks"]:
        case.pop("options", None)
        case["stats"].pop("data", None)
