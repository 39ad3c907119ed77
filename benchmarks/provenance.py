"""On what a result was measured: versions, commit, processor, threads, hashes."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache as memoise
from pathlib import Path
from typing import Any

import torch

PACKAGES = [
    "resting-neurons",
    "torch",
    "transformers",
    "safetensors",
    "tokenizers",
    "gguf",
    "numpy",
    "scipy",
    "numba",
    "triton",
]


def collect(device: str) -> dict[str, Any]:
    """Facts about this machine and this checkout."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "packages": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "git": dict(checkout()),
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "device": _device(device),
        "gpu": _gpu() if device != "cpu" and torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


@memoise
def version(package: str) -> str | None:
    """Version of an installed package, when this process asked for it first."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


@memoise
def checkout() -> Mapping[str, Any]:
    """Commit of the code when this process asked for it first, and whether files differ from it.

    What measures asks when it begins: a commit made while it runs is not what it runs with.
    """

    def run(*args: str) -> str | None:
        try:
            folder = Path(__file__).parent
            done = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # What a run itself writes does not make its code dirty.
    changes = run("status", "--porcelain", "--", ".", ":(top)", ":(exclude,top)results")
    return {"commit": run("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes)}


def _device(device: str) -> str:
    if device == "auto" and torch.cuda.is_available():
        return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return "cpu" if device in ("auto", "cpu") else torch.cuda.get_device_name(device)


def _gpu() -> dict[str, str]:
    """What the driver says of the devices; numbers change while they work."""
    fields = ["name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit"]
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        line = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return {"cuda": str(torch.version.cuda)}
    return {"cuda": str(torch.version.cuda), **dict(zip(fields, line.split(", ")))}


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
