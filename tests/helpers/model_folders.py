"""Changes a model folder, and loads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gguf_files import logits
from safetensors.torch import load_file, save_file

from resting.benchmarks.assets import models

UP = "model.layers.1.mlp.up_proj.weight"


def loaded(folder: Path, **others: Any) -> torch.Tensor:
    return logits(models.resolve(str(folder), **others).load(torch.float32))


def change(folder: Path, act: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    act(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def configure(folder: Path, **values: Any) -> None:
    known = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps(known))
