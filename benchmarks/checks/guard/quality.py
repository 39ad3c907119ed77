"""Measures figures of the embedded model that may differ by rounding only.

A mask is a jump, and a forward through thirty masked blocks is chaotic: what rounds differently on another processor
lets a few borderline inputs rest that did not, later layers see other inputs, and later tokens other keys and values.
Float64 does not end that, since transformers computes norms and rotary angles in float32. So figures are chosen that
hang on roundings as little as possible:

- `layer_error` gives every layer the dense model's own input, so that no difference reaches a later layer. Its
  tolerance is narrow, and it is the figure that finds small faults.
- KL of the whole model is of short windows, since a difference grows along a window; nats of a text, which look at one
  token of every distribution, move three times as far. Its tolerance is wide.
- Plans are fitted at a given nominal ratio: where the match of measured bytes ends hangs on roundings. The guard looks
  at matching in `exact.py`.
- Biases of a model in float64 are computed and kept in float64.

`jitter.py` measures what is left of it; the tolerances in `check.py` are from there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models
from resting.benchmarks.quality.perplexity import DenseReference, score
from resting.benchmarks.quality.windows import windows_of
from resting.method.mean_error import MeanError
from resting.sparsifier import AllButFirst, CalibratedModel, Calibration, Plan
from resting.sparsifier.layers import SparseLinear
from resting.sparsifier.logits import final_hidden, mean_nll

WINDOWS, LENGTH = 8, 16
TARGET = 0.5
SPARSE = AllButFirst(1)


class UnmatchedModel(CalibratedModel):
    """A calibrated model that finds every plan at its target, so that a fit ends at its first nominal ratio."""

    def measure(self, plan: Plan) -> float:
        return plan.target


def embedded() -> tuple[Any, Any]:
    """Load the embedded model in float64, and its tokenizer."""
    source = models.resolve(models.DEFAULT)
    return source.load(torch.float64), source.tokenizer()


def windows(tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Read calibration and evaluation windows [8, 16]."""
    calibration = windows_of("wikipedia", "calibration", tokenizer, LENGTH, WINDOWS).ids
    return calibration, windows_of("wikipedia", "evaluation", tokenizer, LENGTH, WINDOWS).ids


def plans(model: Any, calibration: Tensor) -> dict[str, Plan]:
    """Fit what is guarded: TEAL, and the mean error over it."""
    calibrated = UnmatchedModel(model, Calibration(calibration, batch_size=WINDOWS))
    teal = Teal(target=TARGET)
    return {"teal": teal.plan_for(calibrated), "mean-error(teal)": MeanError(teal).plan_for(calibrated)}


def dense(model: Any, evaluation: Tensor) -> DenseReference:
    """Hold the dense model and the windows that plans are compared with it on."""
    return DenseReference(model, evaluation, WINDOWS)


def measure_dense(reference: DenseReference) -> dict[str, Any]:
    """Measure nats per token of the dense model."""
    return {"nats dense": mean_nll(reference.model, reference.windows, WINDOWS)}


def measure(reference: DenseReference, fitted: dict[str, Plan]) -> dict[str, Any]:
    """Measure for every plan KL to the dense model, byte sparsity and `layer_error`."""
    found: dict[str, Any] = {}
    for name, plan in fitted.items():
        scored = score(reference, plan, SPARSE)
        found[f"kl {name}"] = scored.divergence()[0]
        found[f"byte sparsity {name}"] = scored.byte_sparsity
        found[f"layer error {name}"] = layer_error(reference, plan)
    return found


@torch.no_grad()
def layer_error(reference: DenseReference, plan: Plan) -> float:
    """Measure how far a plan's layers are from dense ones, each of them on the dense model's own input.

    Returns
    -------
    float
        Squared error of a layer's output over the square of the dense output, both summed over sparse tokens; the mean
        over layers.
    """
    errors: list[float] = []

    def compare(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(layer, SparseLinear)
        wanted = layer.linear(args[0])
        errors.append(float((output - wanted)[:, SPARSE.n :].square().sum() / wanted[:, SPARSE.n :].square().sum()))
        return wanted

    with plan.applied(reference.model, SPARSE) as layers:
        hooks = [layer.register_forward_hook(compare) for layer in layers.values() if isinstance(layer, SparseLinear)]
        final_hidden(reference.model, reference.windows)
        for hook in hooks:
            hook.remove()
    return sum(errors) / len(errors)
