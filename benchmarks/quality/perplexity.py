"""Token perplexity, and KL to the dense model, on windows of text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier import Meter, OnProgress, Plan, TokenPolicy, silent
from resting.sparsifier.logits import final_hidden, logits
from resting.sparsifier.quantised.model import format_of

CHUNK = 128
"""Tokens whose logits are in memory at a time."""
ROOM = 4 * 2**30
"""Bytes of the dense model's log-probabilities that are kept; what does not fit is computed again when it is needed."""


class DenseReference:
    """Keeps the dense model's final hidden states on a set of windows; its logits are computed from them.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    windows : Tensor [n, length]
    batch_size : int
        Windows per forward.
    name : str
        Of the text, for progress.
    """

    def __init__(self, model: Any, windows: Tensor, batch_size: int, name: str = "text") -> None:
        self.model = model
        self.name = name
        self.windows = windows
        self.batch_size = batch_size
        self._hidden: list[Tensor] = []
        self._log_p: dict[tuple[int, int], Tensor] = {}
        self._room = ROOM

    @torch.no_grad()
    def hidden(self, start: int) -> Tensor:
        """Return the hidden states of the batch that begins at window `start`.

        No plan may be applied at the first call.
        """
        device = next(self.model.parameters()).device
        while len(self._hidden) <= start // self.batch_size:
            first = len(self._hidden) * self.batch_size
            self._hidden.append(final_hidden(self.model, self.windows[first : first + self.batch_size].to(device)))
        return self._hidden[start // self.batch_size]

    @torch.no_grad()
    def log_probabilities(self, window: int, start: int) -> Tensor:
        """Return log-probabilities of what follows tokens `start` to ``start + CHUNK``, [chunk, vocabulary] in fp32."""
        if (window, start) in self._log_p:
            return self._log_p[window, start]
        states = self.hidden(window // self.batch_size * self.batch_size)[window % self.batch_size]
        log_p = logits(self.model, states[:-1][start : start + CHUNK]).float().log_softmax(-1)
        if self._room >= log_p.nbytes:
            self._room -= log_p.nbytes
            self._log_p[window, start] = log_p
        return log_p


@dataclass(frozen=True)
class Score:
    """Holds sums over the scored tokens of each window.

    Attributes
    ----------
    nll, kl : ndarray [windows]
        Negative log-likelihood of the text and KL(dense || sparse), in nats.
    scored_tokens : int
        Scored tokens per window: all but the first and those that are only context.
    byte_sparsity : float
        Measured on this text.
    bits_read : float
        Likewise: what a sparse token reads, over the weights of the blocks' matrices (`Meter.bits_read`).
    """

    nll: np.ndarray
    kl: np.ndarray
    scored_tokens: int
    byte_sparsity: float
    bits_read: float = math.nan

    @property
    def n(self) -> int:
        """Number of scored tokens in all windows."""
        return self.scored_tokens * len(self.nll)

    def perplexity(self) -> tuple[float, float]:
        """Return the perplexity and its standard error over windows (delta method)."""
        mean, error = mean_and_error(self.nll / self.scored_tokens)
        value = exp(mean)
        return value, value * error

    def divergence(self) -> tuple[float, float]:
        """Return the mean KL in nats per token and its standard error over windows."""
        return mean_and_error(self.kl / self.scored_tokens)


def exp(nats: float) -> float:
    """Return the exponential of `nats`; infinity where it is above what a float holds."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """Return mean and standard error; the error of a single value, or of infinite ones, is not known (NaN)."""
    if not np.isfinite(values).all():
        return float(values.mean()), math.nan
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    return float(values.mean()), error


@torch.no_grad()
def score(
    reference: DenseReference,
    plan: Plan,
    policy: TokenPolicy,
    on_progress: OnProgress = silent,
    folded: bool = False,
    last: int | None = None,
) -> Score:
    """Score the windows of `reference` under `plan`.

    Parameters
    ----------
    reference : DenseReference
    plan : Plan
    policy : TokenPolicy
        Decides which tokens are sparse.
    folded : bool
        Run the exported form, with biases in the linear layers, on every token.
    last : int, optional
        Score the last so many tokens of a window, instead of those after the policy's context.
    """
    model, windows, size = reference.model, reference.windows, reference.batch_size
    device = next(model.parameters()).device
    starts = range(0, len(windows), size)
    for start in starts:
        reference.hidden(start)
    length = windows.shape[1]
    context = policy.context(length) if last is None else length - 1 - last
    nll, kl = np.zeros(len(windows)), np.zeros(len(windows))
    meter = Meter()

    def run(masks: Plan) -> None:
        with masks.applied(model, policy, meter):
            for start in starts:
                ids = windows[start : start + size].to(device)
                hidden = final_hidden(model, ids)
                for i in range(len(ids)):
                    nll[start + i], kl[start + i] = _window(reference, start + i, hidden[i], ids[i], context)
                on_progress(reference.name, min(start + size, len(windows)), len(windows), "windows")

    if folded:
        with plan.folded(model) as masks:
            run(masks)
    else:
        run(plan)
    format = format_of(model)
    stored = () if format is None else (format.bits, format.bits_beside)
    return Score(nll, kl, length - 1 - context, meter.byte_sparsity(), meter.bits_read(*stored))


def _window(reference: DenseReference, window: int, sparse: Tensor, ids: Tensor, context: int) -> tuple[float, float]:
    nll = kl = 0.0
    for start in range(context, len(ids) - 1, CHUNK):
        log_p = reference.log_probabilities(window, start)
        log_q = logits(reference.model, sparse[:-1][start : start + CHUNK]).float().log_softmax(-1)
        following = ids[1:][start : start + CHUNK, None]
        nll -= float(log_q.gather(-1, following).double().sum())
        kl += float((log_p.exp() * (log_p - log_q)).sum(-1).double().sum())
    return nll, kl
