"""Token perplexity, and KL to the dense model, on windows of text."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier import Meter, OnProgress, Plan, TokenPolicy, silent
from resting.sparsifier.batches import LOGITS, has_room
from resting.sparsifier.logits import final_hidden, logits
from resting.sparsifier.quantised.model import format_of

CHUNK = 128
"""Tokens whose logits are in memory at a time on a CPU."""
ROOM = 4 * 2**30
"""Bytes of the dense model's log-probabilities that are kept on a CPU; the others are computed again when needed."""


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
        self._kept: dict[tuple[int, int, int, int, int], Tensor] = {}
        self._room = ROOM

    @cached_property
    def batches(self) -> list[Tensor]:
        """The windows of each forward, [batch_size, length], where the model takes them."""
        return list(self.windows.to(next(self.model.parameters()).device).split(self.batch_size))

    @torch.no_grad()
    def hidden(self, start: int) -> Tensor:
        """Return the hidden states of the batch that begins at window `start`.

        No plan may be applied at the first call.
        """
        while len(self._hidden) <= start // self.batch_size:
            self._hidden.append(final_hidden(self.model, self.batches[len(self._hidden)]))
        return self._hidden[start // self.batch_size]

    @torch.no_grad()
    def teacher(self, batch: int, windows: slice, tokens: slice, as_logits: bool) -> Tensor:
        """Return what the dense model says of the tokens that follow `tokens`, [windows * tokens, vocabulary].

        Parameters
        ----------
        batch : int
            Number of the forward.
        windows, tokens : slice
            Of the batch, and of its windows.
        as_logits : bool
            Logits in the model's dtype instead of log-probabilities in fp32.
        """
        key = (batch, windows.start, windows.stop, tokens.start, tokens.stop)
        if key in self._kept:
            return self._kept[key]
        found = logits(self.model, self.hidden(batch * self.batch_size)[windows, tokens].flatten(0, 1))
        found = found.contiguous() if as_logits else found.float().log_softmax(-1)
        if self._has_room(found):
            self._kept[key] = found
        return found

    def make_room(self) -> None:
        """Give back a GPU's memory that could be needed: what it held is computed again."""
        self._kept = {key: held for key, held in self._kept.items() if held.device.type != "cuda"}

    def _has_room(self, found: Tensor) -> bool:
        if found.device.type == "cuda":
            return has_room(found.device, found.nbytes)
        if self._room < found.nbytes:
            return False
        self._room -= found.nbytes
        return True


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
    for start in range(0, len(windows), size):
        reference.hidden(start)
    length = windows.shape[1]
    context = policy.context(length) if last is None else length - 1 - last
    found: list[Tensor] = []
    meter = Meter()

    def run(masks: Plan) -> None:
        with masks.applied(model, policy, meter):
            for number, ids in enumerate(reference.batches):
                found.append(_sums(reference, number, final_hidden(model, ids), ids, context))
                on_progress(reference.name, min((number + 1) * size, len(windows)), len(windows), "windows")

    if folded:
        with plan.folded(model) as masks:
            run(masks)
    else:
        run(plan)
    format = format_of(model)
    stored = () if format is None else (format.bits, format.bits_beside)
    unread, bits = meter.byte_sparsity(), meter.bits_read(*stored)  # until its sums are launched, no GPU is waited for
    nll, kl = torch.cat(found, 1).cpu().numpy()
    return Score(nll, kl, length - 1 - context, unread, bits)


def _sums(reference: DenseReference, batch: int, sparse: Tensor, ids: Tensor, context: int) -> Tensor:
    """Add up negative log-likelihood and KL over each window of a batch, [2, windows] in fp64 on the model's device."""
    length = ids.shape[1]
    fused = _has_kernel(sparse.device)
    total = torch.zeros(2, len(ids), dtype=torch.float64, device=sparse.device)
    for windows, tokens in _pieces(len(ids), context, length - 1, reference.model, sparse.device):
        teacher = reference.teacher(batch, windows, tokens, as_logits=fused)
        own = logits(reference.model, sparse[windows, tokens].flatten(0, 1))
        following = ids[windows, tokens.start + 1 : tokens.stop + 1].flatten().to(own.device)
        by_token = _by_kernel(teacher, own, following) if fused else _by_token(teacher, own, following)
        of_windows = by_token.double().view(2, windows.stop - windows.start, -1).sum(-1)
        total[:, windows] += of_windows.to(total.device)
    return total


def _pieces(count: int, first: int, last: int, model: Any, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Yield windows of a batch and tokens of them whose logits are in memory together."""
    at_once, chunk = 1, CHUNK
    if device.type == "cuda":
        rows = max(CHUNK, LOGITS // 4 // model.config.get_text_config().vocab_size)
        at_once, chunk = max(1, rows // max(1, last - first)), rows
    for window in range(0, count, at_once):
        for start in range(first, last, chunk):
            yield slice(window, min(window + at_once, count)), slice(start, min(start + chunk, last))


def _by_token(log_p: Tensor, own: Tensor, following: Tensor) -> Tensor:
    log_q = own.float().log_softmax(-1)
    nll = -log_q.gather(-1, following[:, None])[:, 0]
    return torch.stack([nll, (log_p.exp() * (log_p - log_q)).sum(-1)])


def _by_kernel(teacher: Tensor, own: Tensor, following: Tensor) -> Tensor:
    from resting.benchmarks.quality import vocabulary_kernel  # Triton is not everywhere

    return torch.stack(vocabulary_kernel.nll_and_kl(teacher, own.contiguous(), following))


@cache
def _has_kernel(device: torch.device) -> bool:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    from resting.benchmarks.quality import vocabulary_kernel

    return vocabulary_kernel.works(device)
