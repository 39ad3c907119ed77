"""Defines a method, and measures it against TEAL at equal bytes.

Run it as ``python examples/add_a_method.py``. It takes about a minute on two cores.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from resting import Calibration, Meter, Rule, Site, Sparsifier, Statistics, Teal
from resting.benchmarks.assets import models, texts


class Tilted(Sparsifier):
    """Takes TEAL's thresholds with 1.2 times the ratio at o and down, and 0.8 times elsewhere."""

    name: ClassVar[str] = "tilted"

    def rule(self, site: Site, statistics: Statistics, ratio: float) -> Rule:
        tilt = 1.2 if site.role in ("o", "down") else 0.8
        return Rule(threshold=statistics[site].quantile(min(1.0, tilt * ratio)))


def windows(tokenizer: Any, split: str, count: int, length: int = 128) -> Tensor:
    """Cut `count` windows out of Wikipedia; documents of the two splits are disjoint."""
    text = "\n\n".join(texts.documents("wikipedia", split)[: 2 * count])
    return torch.tensor(tokenizer(text).input_ids[: count * length]).view(count, length)


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Compute the mean loss of next tokens, in nats."""
    return float(model(ids, labels=ids).loss)


def compare(model: Any, calibration: Calibration, held_out: Tensor) -> dict[tuple[str, float], float]:
    """Fit both methods at two targets, and return the loss above dense by method and target."""
    dense, lost = loss(model, held_out), {}
    for target in (0.25, 0.50):
        for method in (Teal(target=target), Tilted(target=target)):
            plan, meter = method.fit(model, calibration), Meter()
            with plan.applied(model, meter=meter):
                lost[plan.method, target] = loss(model, held_out) - dense
            measured = f"{meter.byte_sparsity():.3f} measured"
            print(f"{plan.method:8} at {target:.2f} ({measured}): {lost[plan.method, target]:.3f} nats above dense")
    return lost


if __name__ == "__main__":
    source = models.resolve("smollm2-135m")
    tokenizer = source.tokenizer()
    calibration = Calibration(windows(tokenizer, "calibration", 8), statistics_windows=8)
    compare(source.load(torch.float32), calibration, windows(tokenizer, "evaluation", 8))
