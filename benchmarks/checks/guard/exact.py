"""Measures what must be the same bit for bit on every machine: masks and bytes of a tiny model in float64.

It is so small that practically no input is borderline, whatever rounds differently.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.method.mean_error import MeanError
from resting.sparsifier import AllButFirst, Calibration, Meter, Plan, Sparsifier
from resting.sparsifier.layers import SparseActivation, SparseLinear

VOCABULARY = 89
METHODS: dict[str, Sparsifier] = {
    "teal": Teal(target=0.5),
    "cats": Cats(target=0.25),
    "chess": Chess(target=0.25),
    "rsparse": RSparse(target=0.4),
    "mean-error(teal)": MeanError(Teal(target=0.5)),
}


def model() -> Any:
    """Build a tiny model with weights from an integer recurrence: no random generator, no library's initialisation."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes, tie_word_embeddings=True)
    built = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for number, parameter in enumerate(built.parameters()):
            if parameter.dim() == 2:
                parameter.copy_(_numbers(parameter.numel(), 7 * number + 1).view_as(parameter))
    return built


def _numbers(count: int, start: int) -> Tensor:
    """Make numbers in [-0.3, 0.3] by a linear congruence: the same everywhere."""
    value, out = start, []
    for _ in range(count):
        value = (1103515245 * value + 12345) % 2**31
        out.append(value / 2**31 - 0.5)
    return torch.tensor(out, dtype=torch.float64) * 0.6


def tokens() -> Tensor:
    """Make windows [4, 32] of tokens."""
    return (_numbers(4 * 32, 99).view(4, 32).abs() * 1e6).long() % (VOCABULARY - 3) + 3


@torch.no_grad()
def measure(change: Callable[[Plan], Plan] = lambda plan: plan) -> dict[str, Any]:
    """Measure for every method a hash of all of its masks on the windows, and the byte sparsity.

    Parameters
    ----------
    change : callable
        What is done to a plan before it is measured.
    """
    built, ids = model(), tokens()
    found: dict[str, Any] = {}
    for name, method in METHODS.items():
        plan = change(method.fit(built, Calibration(ids)))
        found[f"masks {name}"], found[f"bytes {name}"] = masks(built, plan, ids)
    return found


def masks(built: Any, plan: Plan, ids: Tensor) -> tuple[str, float]:
    """Hash which inputs rest at all sites, in order (sha256), and measure the byte sparsity."""
    digest, meter = hashlib.sha256(), Meter()
    with plan.applied(built, AllButFirst(1), meter):
        handles = []
        for module in built.modules():
            if isinstance(module, SparseLinear):
                handles.append(module.linear.register_forward_pre_hook(lambda _, args: _feed(digest, args[0])))
            elif isinstance(module, SparseActivation):
                handles.append(module.register_forward_hook(lambda _, args, out: _feed(digest, out)))
        built(input_ids=ids)
        for handle in handles:
            handle.remove()
    return digest.hexdigest(), meter.byte_sparsity()


def _feed(digest: Any, kept: Tensor) -> None:
    digest.update((kept != 0).to(torch.uint8).contiguous().numpy().tobytes())
