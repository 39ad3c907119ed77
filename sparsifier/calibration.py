"""Defines the text that a sparsifier is fitted on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor

from resting.sparsifier import fingerprint
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import AllButFirst, TokenPolicy


@dataclass(frozen=True)
class Calibration:
    """Holds token windows and says how they are used.

    Attributes
    ----------
    windows : Tensor [n, length] of int64
        Token ids. All of them are there for methods that train.
    statistics_windows : int
        The first so many windows give the statistics (histograms, means).
    matching : Tensor [m, length], optional
        Windows that are run sparse to make the measured byte sparsity meet the target; they may be of another length
        and of more texts than the statistics, since how many inputs exceed a threshold differs between texts. The
        statistics windows where None.
    tokens : TokenPolicy
        Which tokens are sparse when the sparse model runs on this text.
    statistics_tokens : TokenPolicy, optional
        Which tokens give statistics and train. By default all but the first, whichever ones `tokens` makes sparse: a
        prompt that some policy leaves dense is text like any other, and a tenth of a text is a poor sample of it;
        only attention sinks differ from what a mask will see.
    attention_mask : Tensor [n, length], optional
        0 for padding, which enters no statistic.
    batch_size : int
        Windows per forward.
    expert_tokens : int
        Tokens that must come to an expert for statistics of its own; with fewer it gets those of all experts of its
        block together.
    """

    windows: Tensor
    statistics_windows: int = 32
    matching: Tensor | None = None
    tokens: TokenPolicy = field(default_factory=AllButFirst)
    statistics_tokens: TokenPolicy | None = None
    attention_mask: Tensor | None = None
    batch_size: int = 4
    expert_tokens: int = 64

    def __post_init__(self) -> None:
        if self.windows.dim() != 2 or not len(self.windows):
            raise SparsifierError(f"calibration windows must be [n, length] token ids, got {list(self.windows.shape)}")

    @property
    def statistics_policy(self) -> TokenPolicy:
        """Gives `statistics_tokens`, or what stands for them."""
        if self.statistics_tokens is not None:
            return self.statistics_tokens
        return self.tokens if isinstance(self.tokens, AllButFirst) else AllButFirst(1)

    def policy(self, windows: Tensor) -> TokenPolicy:
        """Gives the token policy for sparse runs over `windows`: that of statistics where `tokens` leaves all dense."""
        return self.tokens if _some_sparse(self.tokens, windows) else self.statistics_policy_for(windows)

    def statistics_policy_for(self, windows: Tensor) -> TokenPolicy:
        """Gives `statistics_policy`, or all tokens where it leaves every one of `windows` dense."""
        return self.statistics_policy if _some_sparse(self.statistics_policy, windows) else AllButFirst(0)

    def statistics_batches(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields token ids and attention mask of the statistics windows, a batch at a time."""
        count = min(self.statistics_windows, len(self.windows))
        for start in range(0, count, self.batch_size):
            stop = min(start + self.batch_size, count)
            mask = None if self.attention_mask is None else self.attention_mask[start:stop]
            yield self.windows[start:stop], mask

    def matching_batches(self, at_once: int | None = None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yields token ids and attention mask of the matching windows, `at_once` or a batch at a time."""
        if self.matching is None:
            yield from self.statistics_batches()
            return
        for ids in self.matching.split(at_once or self.batch_size):
            yield ids, None

    @property
    def digest(self) -> str:
        """Hashes the token ids and how they are used (sha256)."""
        matching = "" if self.matching is None else fingerprint.of_tensor(self.matching)
        return hashlib.sha256(f"{self.training_digest},{self.tokens},{matching}".encode()).hexdigest()

    @property
    def training_digest(self) -> str:
        """Hashes what statistics and training depend on, without what only byte targets are met on (sha256)."""
        use = f"{self.statistics_windows},{self.statistics_policy},{self.batch_size}"
        use += f",{self.expert_tokens}" * (self.expert_tokens != 64)
        tensors = (self.windows, self.attention_mask)
        values = ["" if t is None else fingerprint.of_tensor(t) for t in tensors]
        return hashlib.sha256(",".join([*values, use]).encode()).hexdigest()


def _some_sparse(policy: TokenPolicy, windows: Tensor) -> bool:
    return policy.dense_tokens(windows.shape[1], 0) < windows.shape[1]
