"""Writes a model's folder with random weights in a published shape, to rehearse a sweep of a model that is not there.

    python benchmarks/micro/random_folder.py llama-3-70b DIR
    resting run scale --device auto --model DIR --methods dense,teal --targets 0.5 --windows 8 --name scale-70b

Weights are in bfloat16, a file a block, so that no more than a few blocks are in memory. Times and memory are those of
the real model; losses mean nothing. The tokenizer is that of the default model, or of the folder after `--tokenizer`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from resting.benchmarks.assets.models import DEFAULT, resolve
from resting.benchmarks.latency.random_models import config_of, shapes

THREADS = 8


def write(config: Any, folder: Path) -> int:
    """Write configuration and weights, the same ones every time on the same kind of device.

    Returns
    -------
    int
        Bytes of the weights.
    """
    folder.mkdir(parents=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    parts: dict[int, dict[str, torch.Size]] = defaultdict(dict)
    for name, parameter in model.named_parameters():  # tied ones have one name
        block = re.search(r"layers\.(\d+)\.", name)
        parts[int(block[1]) + 1 if block else 0][name] = parameter.shape
    model.config.save_pretrained(folder)
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] or ["cpu"]

    def save(part: int) -> dict[str, str]:
        device = devices[part % len(devices)]
        generator = torch.Generator(device).manual_seed(part)
        file = f"model-{part:05d}.safetensors"
        save_file({n: drawn(shape, generator) for n, shape in parts[part].items()}, folder / file, {"format": "pt"})
        return dict.fromkeys(parts[part], file)

    def drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
        if len(shape) < 2:  # norms
            return torch.ones(shape, dtype=torch.bfloat16)
        weights = torch.empty(shape, dtype=torch.bfloat16, device=generator.device)
        return weights.normal_(std=config.initializer_range, generator=generator).cpu()

    with ThreadPoolExecutor(THREADS) as pool:
        files = {name: file for saved in pool.map(save, parts) for name, file in saved.items()}
    size = 2 * sum(shape.numel() for part in parts.values() for shape in part.values())
    index = {"metadata": {"total_size": size}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return size


def main() -> None:
    """Write the folder, and say how large it is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=[name for name in shapes() if name != "tiny"])
    parser.add_argument("folder", type=Path, help="must not exist")
    parser.add_argument("--tokenizer", default=DEFAULT, help="a model's folder")
    chosen = parser.parse_args()
    if chosen.folder.exists():
        parser.error(f"{chosen.folder} exists")
    tokenizer = resolve(chosen.tokenizer, print).tokenizer()
    size = write(config_of(chosen.shape), chosen.folder)
    tokenizer.save_pretrained(chosen.folder)
    print(f"{chosen.folder}: {size / 1e9:.1f} GB")


if __name__ == "__main__":
    main()
