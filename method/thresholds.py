"""Keeps the bytes constant while training moves thresholds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from resting.method.masks import TrainedMask
from resting.sparsifier import Site


@dataclass
class ConstantBytes:
    r"""Keeps descent on thresholds from trading bytes for loss.

    At a constrained optimum ``dL/d delta_i = lambda dB/d delta_i`` with one lambda for all thresholds, B the share of
    bytes that is read. Descent is on ``dL - lambda dB``, with lambda the ratio of both gradients along the direction in
    which all thresholds move together, smoothed over steps; what a step still changes of B, all thresholds give back
    together.
    """

    smoothing: float = 0.9
    loss_slope: float = 0.0
    byte_slope: float = 0.0

    def project(self, masks: Mapping[Site, TrainedMask]) -> None:
        """Takes from the gradients of all deltas what only trades bytes for loss."""
        keep = self.smoothing
        losses = _total(next(mask.trained())[0].grad for mask in masks.values())
        read = _total(mask.byte_slope for mask in masks.values())
        self.loss_slope = keep * self.loss_slope + (1 - keep) * losses
        self.byte_slope = keep * self.byte_slope + (1 - keep) * read
        if self.byte_slope:
            for mask in masks.values():
                for delta, slope in mask.trained():
                    if delta.grad is not None:
                        delta.grad -= self.loss_slope / self.byte_slope * slope

    @torch.no_grad()
    def give_back(self, masks: Mapping[Site, TrainedMask], before: Mapping[Site, Tensor]) -> None:
        """Moves all thresholds by one factor, so that to first order the step changed no bytes."""
        total = _total(mask.byte_slope for mask in masks.values())
        changed = _total(mask.byte_slope * (mask.delta - before[site]) for site, mask in masks.items())
        if total:
            for mask in masks.values():
                next(mask.trained())[0].sub_(changed / total)


def _total(values: Iterable[Tensor | None]) -> float:
    sums = [value.sum() for value in values if value is not None]
    return float(torch.stack(sums).sum()) if sums else 0.0
