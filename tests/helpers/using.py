"""A tiny model and plans of it in folders, as the commands that use plans take them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import tiny
import torch

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models
from resting.method.mean_error import MeanError
from resting.sparsifier import Plan

PROMPT = "w1 w7 w3 w20 w4"


def model(folder: Path) -> torch.nn.Module:
    return models.resolve(str(folder)).load(torch.float32)


def make(folder: Path) -> None:
    """``model``: a tiny Llama whose tokenizer has an end; ``plan``: masks and biases of it, fitted."""
    tiny.model_folder(folder / "model")
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = "w89"
    tokenizer.save_pretrained(folder / "model")
    plan = MeanError(Teal(target=0.5)).fit(model(folder / "model"), tiny.calibration())
    replace(plan, info=plan.info | {"fitted": {"model": "model", "loss": 0.125}}).save(folder / "plan")


def room() -> Path:
    return tiny.once("using", make)


def plan() -> Plan:
    return Plan.load(room() / "plan")


def greedy(model: torch.nn.Module, ids: list[int], steps: int, stop: int = 2) -> list[int]:
    """The likeliest token so many times, every time from the whole text; it ends after `stop`."""
    new: list[int] = []
    with torch.no_grad():
        while len(new) < steps and stop not in new:
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new
