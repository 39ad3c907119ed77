"""Fits of a few steps on documents of known words, and what such a plan does, computed another way."""

from __future__ import annotations

import copy
import random
from typing import Any

import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resting.sparsifier import Plan

WINDOW = 16
TRAINED = {"window": WINDOW, "batch": 4, "match_every": 2, "warmup": 2}
"""Parameters of a training run that takes a fraction of a second."""
PARTS = {
    "q": "self_attn",
    "k": "self_attn",
    "v": "self_attn",
    "o": "self_attn",
    "gate": "mlp",
    "up": "mlp",
    "down": "mlp",
}


def documents(count: int = 40, seed: int = 7) -> list[str]:
    """Documents of 60 words, each another."""
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(tiny.WORDS, k=60)) for _ in range(count)]


def ids_of(text: list[str] | str) -> list[int]:
    """Numbers of the words, without the tokenizer."""
    joined = text if isinstance(text, str) else " ".join(text)
    return [3 + int(word.removeprefix("w")) for word in joined.split()]


def windows_of(text: list[str] | str) -> list[list[int]]:
    ids = ids_of(text)
    return [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]


def as_sets(windows: Tensor) -> set[tuple[int, ...]]:
    return {tuple(row) for row in windows.tolist()}


def of(model: nn.Module, method: Any = "spon-refined(teal)", **more: Any) -> Plan:
    """Fit `method`, by default one that trains for eight steps."""
    import resting

    trains = {"steps": 8, "parameters": TRAINED} if str(method).startswith("spon") else {}
    few = {"statistics_windows": 8, "matching_windows": 4, "held_out_windows": 4}
    common = {"tokenizer": tiny.tokenizer(), "text": documents(), "window": WINDOW, "progress": False} | few
    return resting.fit(model, method, **(common | trains | more))


def assert_same(one: Plan, other: Plan) -> None:
    """Same rules bit for bit, and the same words about them but for the time that it took."""
    assert one.rules.keys() == other.rules.keys()
    for site, rule in one.rules.items():
        tensors = other.rules[site].tensors()
        assert rule.tensors().keys() == tensors.keys()
        assert all(torch.equal(value, tensors[key]) for key, value in rule.tensors().items()), site
    told = [copy.deepcopy(plan.info) for plan in (one, other)]
    for info in told:
        assert info["fitted"].pop("seconds") >= 0
    assert told[0] == told[1]
    assert (one.method, one.target, one.nominal, one.calibration) == (
        other.method,
        other.target,
        other.nominal,
        other.calibration,
    )


class Masked(nn.Module):
    """A linear layer as the formula has it: ``W (x where |x| > t) + b`` from the second token on."""

    def __init__(self, linear: nn.Linear, threshold: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.linear, self.threshold, self.bias = linear, threshold, bias
        self.rested = self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        kept = torch.where(x.abs() > self.threshold, x, torch.zeros_like(x))
        self.rested += int((kept[:, 1:] == 0).sum())
        self.seen += kept[:, 1:].numel()
        y = self.linear(kept) + (0 if self.bias is None else self.bias)
        return torch.cat([self.linear(x[:, :1]), y[:, 1:]], 1)


@torch.no_grad()
def looked_at(model: nn.Module, plan: Plan, windows: Tensor) -> dict[str, float]:
    """Dense and sparse loss and unread bytes of a Llama under a plan of thresholds and biases, in loops of our own."""

    def loss(of: nn.Module) -> float:
        nats = [float(F.cross_entropy(of(row[None]).logits[0, :-1], row[1:], reduction="sum")) for row in windows]
        return sum(nats) / (windows.shape[0] * (windows.shape[1] - 1))

    sparse = copy.deepcopy(model)
    layers: list[tuple[Masked, int]] = []
    added = 0
    for site, rule in plan.rules.items():
        parent = getattr(sparse.model.layers[site.block], PARTS[site.role])
        linear = getattr(parent, f"{site.role}_proj")
        layer = Masked(linear, torch.as_tensor(rule.threshold), rule.bias)
        setattr(parent, f"{site.role}_proj", layer)
        layers.append((layer, linear.weight.numel()))
        added += 0 if rule.bias is None else rule.bias.numel()
    found = {"dense_loss": loss(model), "sparse_loss": loss(sparse)}
    unread = sum(layer.rested / layer.seen * elements for layer, elements in layers) - added
    return found | {"byte_sparsity": unread / sum(elements for _, elements in layers)}
