"""Fits TEAL, and spontaneous neurons over it; looks at a plan; measures bytes and loss.

Run it as ``python examples/fit_and_look.py``. It takes about two minutes on two cores, the first time a little longer,
since the model is fetched then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resting import Calibration, Meter, Plan, Site, Spontaneous, Teal
from resting.benchmarks.assets import models, texts


def windows(tokenizer: Any, split: str, count: int, length: int = 128) -> Tensor:
    """Cut `count` windows out of Wikipedia; documents of the two splits are disjoint."""
    text = "\n\n".join(texts.documents("wikipedia", split)[: 2 * count])
    return torch.tensor(tokenizer(text).input_ids[: count * length]).view(count, length)


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Compute the mean loss of next tokens, in nats."""
    return float(model(ids, labels=ids).loss)


def look(plan: Plan) -> None:
    """Print what the plan decided in the first block: the share of inputs that rest, and the threshold."""
    for role in ("q", "o", "up", "down"):
        site = Site(0, role)
        rule = plan.rules[site]
        bias = "none" if rule.bias is None else f"of length {float(rule.bias.norm()):.3f}"
        ratio = plan.info["ratios"][str(site)]
        print(f"  block 0, {role:4}: ratio {ratio:.2f}, threshold {float(rule.threshold):.4f}, bias {bias}")


def compare(model: Any, calibration: Calibration, held_out: Tensor, steps: int = 8) -> dict[str, float]:
    """Fit both methods for half of the bytes, and return what each loses."""
    dense, lost, length = loss(model, held_out), {}, calibration.windows.shape[1]
    for method in (Teal(target=0.5), Spontaneous(Teal(target=0.5), steps=steps, batch=4, window=length)):
        plan, meter = method.fit(model, calibration), Meter()
        print(plan.method)
        look(plan)
        with plan.applied(model, meter=meter):
            lost[plan.method] = loss(model, held_out) - dense
        print(f"  loses {lost[plan.method]:.3f} nats a token, leaves {meter.byte_sparsity():.3f} of the bytes unread")
    return lost


if __name__ == "__main__":
    source = models.resolve("smollm2-135m")
    tokenizer = source.tokenizer()
    calibration = Calibration(windows(tokenizer, "calibration", 32), statistics_windows=8)
    compare(source.load(torch.float32), calibration, windows(tokenizer, "evaluation", 8))
