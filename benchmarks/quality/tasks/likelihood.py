"""Computes log-likelihoods of continuations, the one thing that most tasks ask of a model."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality.tasks.packing import LONGEST, Batch, batches, packed
from resting.sparsifier import OnProgress, silent
from resting.sparsifier.logits import final_hidden, logits

BATCH_TOKENS = 2048
CHUNK = 256
"""Positions whose logits are in memory at a time."""
CACHED = 8
"""Positions whose logits in float32 a processor's cache holds."""

Request = tuple[list[int], list[int]]
"""Context and continuation, as token ids."""
Wanted = list[tuple[int, list[int], tuple[int, ...], list[int]]]
"""Of a batch: row, places of the states that are read, tokens to be likely there, numbers of the requests."""


@dataclass
class Cost:
    """Counts what a run of requests took.

    Attributes
    ----------
    forward, total : float
        Seconds in the model (its output layer included), and in all.
    tokens : int
        Tokens that went through the model, without padding.
    truncated : int
        Requests that were longer than the context and lost their beginning.
    """

    forward: float = 0.0
    total: float = 0.0
    tokens: int = 0
    truncated: int = 0


@dataclass
class Scorer:
    """Scores requests with whatever the model is at that moment.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    context : int
        Tokens the model takes; what is longer is cut from the left, as lm-eval does.
    may_pack : bool
        Whether sequences that share a beginning may share a row. Not so where a sequence's length decides which of
        its tokens are sparse, or where the model has attention of its own (a sliding window).
    name : str
        Of what is asked, for progress.
    on_progress : callable
        Told of sequences done and in all.
    """

    model: Any
    context: int
    may_pack: bool = True
    name: str = "task"
    on_progress: OnProgress = silent
    cost: Cost = field(default_factory=Cost)

    @torch.no_grad()
    def __call__(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Log-likelihood of every continuation in nats, and whether it is what greedy decoding gives.

        Raises
        ------
        AssetError
            If a continuation has no token, or more than the context.
        """
        begin = time.perf_counter()
        asked: dict[tuple[int, ...], dict[tuple[int, ...], list[int]]] = defaultdict(lambda: defaultdict(list))
        for number, (context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.context:
                allowed = f"a continuation must have 1 to {self.context} tokens"
                raise AssetError(
                    f"request {number}: {allowed}, got {len(continuation)} after a context of {len(context)}"
                )
            tokens = tuple([*context, *continuation][-(self.context + 1) :])
            self.cost.truncated += len(context) + len(continuation) > self.context + 1
            asked[tokens[:-1]][tuple(continuation)].append(number)
        sequences = list(asked)
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        packs = packed(sequences, LONGEST if self.may_pack else 0)
        done = 0
        for batch in batches(packs, BATCH_TOKENS):
            wanted = [
                (row, places[number][-len(continuation) :], continuation, numbers)
                for row, places in enumerate(batch.places)
                for number in places
                for continuation, numbers in asked[sequences[number]].items()
            ]
            for (_, _, _, numbers), answer in zip(wanted, self._answers(batch, wanted)):
                for number in numbers:
                    answers[number] = answer
            done += sum(len(places) for places in batch.places)
            self.on_progress(self.name, done, len(sequences), "sequences")
        self.cost.total += time.perf_counter() - begin
        return answers

    def _answers(self, batch: Batch, wanted: Wanted) -> list[tuple[float, bool]]:
        begin = time.perf_counter()
        hidden = self._hidden(batch)
        rows = torch.tensor([row for row, places, _, _ in wanted for _ in places], device=hidden.device)
        columns = torch.tensor([p for _, places, _, _ in wanted for p in places], device=hidden.device)
        targets = torch.tensor([token for _, _, tokens, _ in wanted for token in tokens], device=hidden.device)
        self.cost.tokens += int((batch.positions >= 0).sum())
        states = hidden[rows, columns]
        likelihoods, greedy = [], []
        for at, tokens in zip(states.split(CHUNK), targets.split(CHUNK)):
            for z, token in zip(logits(self.model, at).split(CACHED), tokens.split(CACHED)):
                log_q = z.float().log_softmax(-1)
                likelihoods.append(log_q.gather(-1, token[:, None])[:, 0])
                greedy.append(log_q.argmax(-1) == token)
        lengths = [len(tokens) for _, _, tokens, _ in wanted]
        nats, top = torch.cat(likelihoods).double().cpu().split(lengths), torch.cat(greedy).cpu().split(lengths)
        self.cost.forward += time.perf_counter() - begin
        return [(float(n.sum()), bool(g.all())) for n, g in zip(nats, top)]

    def _hidden(self, batch: Batch) -> Tensor:
        device = next(self.model.parameters()).device
        ids = batch.ids.to(device)
        if batch.is_plain:
            mask = batch.padding_mask()
            return final_hidden(self.model, ids, None if bool(mask.all()) else mask.to(device))
        mask = batch.attention_mask(self.model.dtype)
        return final_hidden(self.model, ids, mask.to(device), batch.positions.to(device))
