"""Tiny random models of several families, and the embedded one."""

from __future__ import annotations

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
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from sparsifier import Calibration

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda: LlamaConfig(**SMALL),
    "mistral": lambda: MistralConfig(**SMALL),
    "qwen2": lambda: Qwen2Config(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, head_dim=8),
}


def build(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model whose weights are large enough that its activations are not all alike."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.15)
    return model


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
    return Calibration(windows, statistics_windows=16)


@pytest.fixture(scope="session")
def embedded():
    """The embedded model, fetched and dequantised once into the user's cache."""
    from benchmarks import models

    return models.resolve(models.DEFAULT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the test's own."""
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path):
    """A tiny package in a folder that pip takes instead of an index."""
    from benchmarks import wheels

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
