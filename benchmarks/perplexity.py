"""Token perplexity, and KL to the dense model, on windows of text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsifier import Meter, Plan, TokenPolicy
from sparsifier.logits import final_hidden, logits

CHUNK = 128
"""Tokens whose logits are in memory at a time."""

Tick = Callable[[int, int], None]


class DenseReference:
    """The dense model's final hidden states on a set of windows, computed once; its logits come from them."""

    def __init__(self, model: Any, windows: Tensor, batch_size: int) -> None:
        self.model = model
        self.windows = windows
        self.batch_size = batch_size
        self._hidden: list[Tensor] = []

    @torch.no_grad()
    def hidden(self, start: int) -> Tensor:
        """Hidden states of the batch that begins at window `start`; no plan may be applied at the first call."""
        device = next(self.model.parameters()).device
        while len(self._hidden) <= start // self.batch_size:
            first = len(self._hidden) * self.batch_size
            self._hidden.append(final_hidden(self.model, self.windows[first : first + self.batch_size].to(device)))
        return self._hidden[start // self.batch_size]


@dataclass(frozen=True)
class Score:
    """Sums over the scored tokens of each window.

    Attributes
    ----------
    nll, kl : ndarray [windows]
        Negative log-likelihood of the text and KL(dense || sparse), in nats.
    tokens : int
        Scored tokens a window: all but the first.
    byte_sparsity : float
        Measured on this text.
    """

    nll: np.ndarray
    kl: np.ndarray
    tokens: int
    byte_sparsity: float

    @property
    def n(self) -> int:
        """Scored tokens in all."""
        return self.tokens * len(self.nll)

    def perplexity(self) -> tuple[float, float]:
        """Perplexity and its standard error over windows (delta method)."""
        mean, error = mean_and_error(self.nll / self.tokens)
        return math.exp(mean), math.exp(mean) * error

    def divergence(self) -> tuple[float, float]:
        """KL in nats a token and its standard error over windows."""
        return mean_and_error(self.kl / self.tokens)


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard error; the error of a single value is not known (NaN)."""
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


@torch.no_grad()
def score(
    reference: DenseReference, plan: Plan, tokens: TokenPolicy, tick: Tick | None = None, folded: bool = False
) -> Score:
    """Score the windows of `reference` under `plan`.

    Parameters
    ----------
    reference : DenseReference
    plan : Plan
    tokens : TokenPolicy
        Which tokens are sparse.
    folded : bool
        Run the exported form: biases in the linear layers, on every token.
    """
    model, windows, size = reference.model, reference.windows, reference.batch_size
    device = next(model.parameters()).device
    starts = range(0, len(windows), size)
    dense = [reference.hidden(start) for start in starts]
    nll, kl = np.zeros(len(windows)), np.zeros(len(windows))
    meter = Meter()

    def run(masks: Plan) -> None:
        with masks.applied(model, tokens, meter):
            for start, teacher in zip(starts, dense):
                ids = windows[start : start + size].to(device)
                hidden = final_hidden(model, ids)
                for i in range(len(ids)):
                    nll[start + i], kl[start + i] = _window(model, teacher[i], hidden[i], ids[i])
                if tick:
                    tick(min(start + size, len(windows)), len(windows))

    if folded:
        with plan.folded(model) as masks:
            run(masks)
    else:
        run(plan)
    return Score(nll, kl, windows.shape[1] - 1, meter.byte_sparsity())


def _window(model: Any, dense: Tensor, sparse: Tensor, ids: Tensor) -> tuple[float, float]:
    nll = kl = 0.0
    following = ids[1:]
    for teacher, student, token in zip(dense[:-1].split(CHUNK), sparse[:-1].split(CHUNK), following.split(CHUNK)):
        log_p = logits(model, teacher).float().log_softmax(-1)
        log_q = logits(model, student).float().log_softmax(-1)
        nll -= float(log_q.gather(-1, token[:, None]).double().sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return nll, kl
