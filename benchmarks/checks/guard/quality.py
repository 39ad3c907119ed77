"""Figures of the embedded model that may differ by rounding only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models
from resting.benchmarks.quality.windows import windows_of
from resting.method.mean_error import MeanError
from resting.sparsifier import AllButFirst, Calibration, Meter, Plan
from resting.sparsifier.logits import mean_nll

WINDOWS, LENGTH = 4, 256
TARGET = 0.5


def windows(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Calibration and evaluation windows [4, 256]."""
    calibration = windows_of("wikipedia", "calibration", tokenizer, LENGTH, WINDOWS).ids
    return calibration, windows_of("wikipedia", "evaluation", tokenizer, LENGTH, WINDOWS).ids


def plans(model: Any, calibration: Tensor) -> dict[str, Plan]:
    """What is guarded: TEAL, and the mean error over it."""
    text = Calibration(calibration, batch_size=WINDOWS)
    teal = Teal(target=TARGET)
    return {"teal": teal.fit(model, text), "mean-error(teal)": MeanError(teal).fit(model, text)}


@torch.no_grad()
def measure(model: Any, fitted: dict[str, Plan], evaluation: Tensor) -> dict[str, Any]:
    """Nats a token of the dense model and above it, byte sparsity, and the nominal ratio of every plan."""
    found: dict[str, Any] = {"nats dense": mean_nll(model, evaluation, WINDOWS)}
    for name, plan in fitted.items():
        meter = Meter()
        with plan.applied(model, AllButFirst(1), meter):
            found[f"nats above dense {name}"] = mean_nll(model, evaluation, WINDOWS) - found["nats dense"]
        found[f"byte sparsity {name}"] = meter.byte_sparsity()
        found[f"nominal {name}"] = plan.nominal
    return found


def embedded() -> tuple[Any, Any]:
    """The embedded model in float64, and its tokenizer.

    In float32 a borderline input rests on one processor and not on another, and what follows in the text differs. In
    float64 there are practically no borderline inputs.
    """
    source = models.resolve(models.DEFAULT)
    return source.load(torch.float64), source.tokenizer()
