"""Says how long and how fast training goes, and on which tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from resting.sparsifier import Calibration, SparsifierError

Decay = Literal["constant", "cosine"]


@dataclass(frozen=True)
class Schedule:
    """Sets how long and how fast training goes.

    Parameters
    ----------
    steps : int
        Optimiser steps.
    batch : int
        Sequences per step.
    window : int
        Tokens per sequence; the calibration windows are cut into such pieces.
    learning_rate : float
        Learning rate of activations, biases, shifts and gains.
    threshold_rate, channel_rate : float
        Learning rates of the logarithms of thresholds: of sites, and of channels relative to their site.
    update_rate : float
        Learning rate of the factors of updates of weights.
    decay : {"constant", "cosine"}
        What all rates do after a linear warm-up: stay, or fall to zero along half a cosine.
    warmup : int
        Steps of warm-up.
    average_from : float
        Share of the steps after which what is trained is averaged (Polyak-Ruppert); the average is the result.
        Gradients of a few thousand tokens are noisy in every coordinate, and the average is less so.
    match_every : int
        Steps between two corrections of the thresholds toward the target; also between two checkpoints.
    match : bool
        Whether thresholds are corrected at all.
    shuffle_tokens : bool
        Train on sequences whose tokens are in a random order (a control).
    seed : int
        Seed of the order of sequences.
    """

    steps: int
    batch: int
    window: int
    learning_rate: float
    warmup: int
    average_from: float
    match_every: int
    match: bool
    seed: int
    threshold_rate: float = 0.03
    channel_rate: float = 0.01
    update_rate: float = 1e-3
    decay: Decay = "constant"
    shuffle_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "window", "warmup", "match_every"):
            if getattr(self, name) < 1:
                raise SparsifierError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "threshold_rate", "channel_rate", "update_rate"):
            if not getattr(self, name) > 0:
                raise SparsifierError(f"{name} must be above 0, got {getattr(self, name)}")
        if not 0.0 <= self.average_from < 1.0:
            raise SparsifierError(f"average_from must be in [0, 1), got {self.average_from}")

    def rate(self, name: str) -> float:
        """Gives the full learning rate of the parameter `name` of a `Compensation`."""
        rates = {"threshold": self.threshold_rate, "channel": self.channel_rate, "update": self.update_rate}
        return rates.get(name.split("/")[0], self.learning_rate)

    def share(self, step: int) -> float:
        """Gives the share of the full learning rates at `step`, which counts from 0."""
        if step < self.warmup or self.decay == "constant":
            return min(1.0, (step + 1) / self.warmup)
        return 0.5 + 0.5 * math.cos(math.pi * (step - self.warmup) / (self.steps - self.warmup))

    def averaged(self, step: int) -> int:
        """Counts the iterates in the average after `step` steps."""
        return max(0, step - int(self.average_from * self.steps))

    def sequences(self, calibration: Calibration) -> Tensor:
        """Gives the token sequences that are trained on, [n, window]."""
        sequences, begin = cut(calibration, self.window)
        if self.shuffle_tokens:
            generator = torch.Generator().manual_seed(self.seed)
            order = torch.rand(sequences[:, begin:].shape, generator=generator).argsort(1)
            sequences = torch.cat([sequences[:, :begin], sequences[:, begin:].gather(1, order)], 1)
        return sequences


def cut(calibration: Calibration, window: int) -> tuple[Tensor, int]:
    """Cuts the calibration windows into pieces [n, window], and counts the first tokens that all of them share.

    Where all windows begin with the same token (BOS), so do all pieces.
    """
    windows = calibration.windows
    if calibration.attention_mask is not None:
        raise SparsifierError("training needs calibration windows without padding")
    begin = 1 if len(windows) > 1 and bool((windows[:, 0] == windows[0, 0]).all()) else 0
    pieces = (windows.shape[1] - begin) // (window - begin) if window > begin else 0
    if not pieces:
        raise SparsifierError(
            f"the training window (the parameter `window`) must be from 2 to the {windows.shape[1]} tokens of a "
            f"calibration window, got {window}"
        )
    body = windows[:, begin : begin + pieces * (window - begin)].reshape(-1, window - begin)
    return torch.cat([windows[:1, :begin].expand(len(body), -1), body], 1), begin


def shuffled(rows: int, count: int, seed: int) -> list[int]:
    """Draws `count` row numbers, epoch by epoch, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-count // rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])[:count].tolist()
