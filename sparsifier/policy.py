"""Decides which tokens of a forward are sparse."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier.errors import SparsifierError

CHUNK = 2**16
Count = int | Tensor
"""A number of entries; as a tensor [] in fp64 it is exact up to 2^53."""


class TokenPolicy(Protocol):
    """Decides how many leading tokens of a sequence stay dense; all later ones are sparse.

    Published accuracies differ in this more than in anything else: TEAL leaves the first half of a prompt dense,
    R-Sparse nine tenths, CATS and CHESS nothing.
    """

    def dense_tokens(self, length: int, past: int) -> int:
        """Gives the number of dense tokens in a forward of `length` new tokens after `past` cached ones."""
        ...

    def context(self, length: int) -> int:
        """Counts leading tokens of a window of `length` that are only context: what they predict is not scored."""
        ...

    def __str__(self) -> str: ...


@dataclass(frozen=True)
class AllButFirst:
    """Makes all tokens sparse but the first `n` of the sequence (attention sinks live there)."""

    n: int = 1

    def __post_init__(self) -> None:
        if self.n < 0:
            raise SparsifierError(f"the number of dense first tokens must be at least 0, got {self.n}")

    def dense_tokens(self, length: int, past: int) -> int:
        return min(length, max(0, self.n - past))

    def context(self, length: int) -> int:
        return 0

    def __str__(self) -> str:
        return f"all-but-first-{self.n}"


@dataclass(frozen=True)
class LastFraction:
    """Makes the last `fraction` of a prompt sparse, and every decoded token.

    Parameters
    ----------
    fraction : float
    round_up : bool
        Round the number of dense tokens down, and so that of sparse ones up, where they are no whole numbers.
    """

    fraction: float = 0.5
    round_up: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.fraction <= 1.0:
            raise SparsifierError(f"the sparse last fraction must be in [0, 1], got {self.fraction}")

    def dense_tokens(self, length: int, past: int) -> int:
        if past:
            return 0
        return int((1.0 - self.fraction) * length) if self.round_up else length - int(self.fraction * length)

    def context(self, length: int) -> int:
        return self.dense_tokens(length, 0)

    def __str__(self) -> str:
        return f"last-{self.fraction:g}{'-rounded-up' * self.round_up}"


@dataclass(frozen=True)
class DecodeOnly:
    """Leaves the prompt dense and makes every token after it sparse.

    Parameters
    ----------
    prompt : int, optional
        Length of the prompt, for windows of text that go through the model at once: what follows the prompt is then
        as if decoded. Without it the prompt is whatever the first forward of a sequence sees.
    """

    prompt: int | None = None

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt < 0:
            raise SparsifierError(f"the prompt must have at least 0 tokens, got {self.prompt}")

    def dense_tokens(self, length: int, past: int) -> int:
        if self.prompt is not None:
            return min(length, max(0, self.prompt - past))
        return 0 if past else length

    def context(self, length: int) -> int:
        return self.dense_tokens(length, 0)

    def __str__(self) -> str:
        return "decode-only" if self.prompt is None else f"decode-after-{self.prompt}"


WRITTEN: tuple[tuple[str, Callable[[str | None], TokenPolicy]], ...] = (
    (r"all-but-first(?:[:-](\d+))?", lambda n: AllButFirst(int(n or 1))),
    (r"last-fraction(?::([\d.]+))?", lambda share: LastFraction(float(share or 0.5))),
    (r"last-([\d.]+)", lambda share: LastFraction(float(share or 0.5))),
    (r"last-([\d.]+)-rounded-up", lambda share: LastFraction(float(share or 0.5), round_up=True)),
    (r"decode-only(?::(\d+))?", lambda prompt: DecodeOnly(None if prompt is None else int(prompt))),
    (r"decode-after-(\d+)", lambda prompt: DecodeOnly(int(prompt or 0))),
)
"""How policies are written in one word: as a person does, and as tables show them (``str(policy)``)."""


def parse(text: str) -> TokenPolicy:
    """Reads a policy that is written in one word, for instance ``all-but-first:1`` or ``last-fraction:0.5``.

    Parameters
    ----------
    text : str
        ``all-but-first[:N]``, ``last-fraction[:SHARE]``, ``decode-only[:PROMPT]``, or what ``str(policy)`` gives.

    Raises
    ------
    SparsifierError
        If it is neither, or its number is out of range.
    """
    for pattern, make in WRITTEN:
        if found := re.fullmatch(pattern, text.strip(), re.ASCII):
            try:
                return make(found.groups()[0])
            except ValueError as error:  # a SparsifierError is one, and says more than float does
                raise SparsifierError(f"token policy {text!r}: {error}") from error
    raise SparsifierError(
        f"token policy {text!r}; allowed: all-but-first[:N], last-fraction[:SHARE], decode-only[:PROMPT]"
    )


def is_by_position(policy: TokenPolicy) -> bool:
    """Tells whether a token's position alone decides, whatever its sequence's length: such sequences may be packed."""
    return isinstance(policy, AllButFirst) or (isinstance(policy, DecodeOnly) and policy.prompt is not None)


@dataclass(frozen=True, eq=False)
class Selection:
    """Marks the sparse tokens of one forward.

    Attributes
    ----------
    dense : int
        Leading dense tokens, when they are the same for every row and nothing is padded.
    sparse : Tensor [batch, length] of bool, optional
        Set instead where rows differ: padding and dense tokens are False.
    shape : (int, int), optional
        Batch and length of the forward; where it is known, an input of other tokens than these is refused.
    counted : bool
        Whether a meter counts this forward: not where it is the repetition of one that was counted.
    last : int, optional
        Tokens at the end that alone may go through later layers: where those have no keys of their own, transformers
        drops the tokens whose logits nobody wants.
    past : int
        Tokens of the cache before this forward.
    real : Tensor [batch, length] of bool, optional
        Which tokens are no padding, where there is some.
    packed : bool
        Whether a row holds several sequences.
    """

    dense: int
    sparse: Tensor | None = None
    shape: tuple[int, int] | None = None
    counted: bool = True
    last: int | None = None
    past: int = 0
    real: Tensor | None = None
    packed: bool = False

    @classmethod
    def of(cls, policy: TokenPolicy, batch: int, length: int, past: int, attention_mask: Tensor | None) -> Selection:
        """Applies `policy` to a forward, row by row where there is padding.

        Parameters
        ----------
        attention_mask : Tensor [batch, past + length], optional
            1 for real tokens, 0 for padding, on either side.
        """
        shape = (batch, length)
        if attention_mask is None or bool(attention_mask.all()):
            return cls(policy.dense_tokens(length, past), shape=shape, past=past)
        real = attention_mask.bool()
        new, seen = real[:, past:], real[:, :past].sum(1)
        dense = [policy.dense_tokens(int(n), int(p)) for n, p in zip(new.sum(1), seen)]
        if len(set(dense)) == 1 and bool(new.all()):  # what is padded came before
            return cls(dense[0], shape=shape, past=past)
        position = new.cumsum(1) - 1
        sparse = new & (position >= torch.tensor(dense, device=new.device)[:, None])
        return cls(0, sparse, shape, past=past, real=new)

    def at(self, tokens: Tensor) -> Selection:
        """Gives the part of it that `tokens` are, counted through all rows: in a forward of [1, len(tokens)]."""
        shape = (1, len(tokens))
        if self.sparse is None and not self.dense:
            return Selection(0, shape=shape, counted=self.counted)
        return Selection(0, self._by_number[tokens.cpu()].to(tokens.device)[None], shape, self.counted)

    @cached_property
    def _by_number(self) -> Tensor:
        """Tells of every token, counted through all rows, whether it is sparse."""
        if self.sparse is not None:
            return self.sparse.flatten().cpu()
        assert self.shape is not None
        sparse = torch.ones(self.shape, dtype=torch.bool)
        sparse[:, : self.dense] = False
        return sparse.flatten()

    @cached_property
    def tokens(self) -> int:
        """Counts the sparse tokens."""
        if self.sparse is not None:
            return int(self.sparse.sum())
        assert self.shape is not None
        return self.shape[0] * (self.shape[1] - self.dense)

    def by_token(self, x: Tensor) -> Tensor:
        """Shows `x` as [batch, length, channels]; it may be flattened, to [batch * length, channels].

        Raises
        ------
        SparsifierError
            If it does not hold the tokens of this forward, one after another.
        """
        if self.shape is None or x.shape[:-1] == self.shape:
            return x
        batch, length = self.shape
        flat = x.dim() == 2 and len(x) == batch * length
        if flat or x.shape[:-1] == (batch, 1, length):  # latents are kept as those of one head
            return x.reshape(batch, length, -1)
        if self.last is not None and x.shape[:-1] == (batch, self.last):
            return x
        raise SparsifierError(
            f"a layer got an input of {list(x.shape)} in a forward of {batch} x {length} tokens: token policies need "
            f"[{batch}, {length}, channels], or the same tokens in one row, [{batch * length}, channels]"
        )

    def dense_of(self, length: int) -> int:
        """Counts the leading dense tokens of the last `length` ones of every row."""
        return self.dense if self.shape is None else max(0, self.dense - self.shape[1] + length)

    def _sparse_of(self, shaped: Tensor) -> Tensor:
        assert self.sparse is not None
        return self.sparse[:, -shaped.shape[1] :]

    def tokens_of(self, x: Tensor) -> int:
        """Counts the sparse tokens of `x`: all, or those of its last ones."""
        shaped = self.by_token(x)
        if self.shape is None or shaped.shape[1] == self.shape[1]:
            return self.tokens
        if self.sparse is not None:
            return int(self._sparse_of(shaped).sum())
        return shaped.shape[0] * (shaped.shape[1] - self.dense_of(shaped.shape[1]))

    def restore_dense(self, kept: Tensor, x: Tensor) -> Tensor:
        """Puts the dense tokens of `x` [batch, length, in] back into `kept`, which is overwritten."""
        if kept is x:
            return x
        shaped, original = self.by_token(kept), self.by_token(x)
        if self.sparse is not None:
            return _as(x, torch.where(self._sparse_of(shaped)[..., None], shaped, original))
        if dense := self.dense_of(shaped.shape[1]):
            shaped[:, :dense] = original[:, :dense]
        return _as(x, shaped)

    def by_kind(self, x: Tensor, sparse: Callable[[Tensor], Tensor], dense: Callable[[Tensor], Tensor]) -> Tensor:
        """Computes `sparse` of the sparse tokens of `x` [batch, length, in], and `dense` of the others.

        Leading dense tokens are computed twice, no other; where rows differ, all are.
        """
        shaped = self.by_token(x)
        if self.sparse is not None:
            y = torch.where(self._sparse_of(shaped)[..., None], sparse(shaped), dense(shaped))
        elif (count := self.dense_of(shaped.shape[1])) >= shaped.shape[1]:
            return dense(x)
        else:
            y = sparse(shaped)
            if count:
                y[:, :count] = dense(shaped[:, :count])
        return y.reshape(*x.shape[:-1], y.shape[-1])

    def add(self, y: Tensor, constant: Tensor) -> Tensor:
        """Adds `constant` [width] to the sparse tokens of `y` [batch, length, width]."""
        shaped = self.by_token(y)
        if self.sparse is not None:
            return _as(y, shaped + constant * self._sparse_of(shaped)[..., None])
        is_sparse = y.new_ones(shaped.shape[1], 1)
        is_sparse[: self.dense_of(shaped.shape[1])] = 0
        return _as(y, shaped + constant * is_sparse)

    def take(self, x: Tensor) -> Tensor:
        """Takes the sparse tokens of `x` [batch, length, ...], flattened to [tokens, ...]."""
        x = self.by_token(x)
        return x[self._sparse_of(x)] if self.sparse is not None else x[:, self.dense_of(x.shape[1]) :].flatten(0, 1)

    def of_sparse(self, counts: Tensor) -> Tensor:
        """Takes the sparse tokens of `counts` [..., batch, length, 1], without a copy where they follow one another.

        Where they do not, batch and length become one.
        """
        length = counts.shape[-2]
        if self.sparse is not None:
            return counts[..., self.sparse[:, -length:], :]
        return counts[..., self.dense_of(length) :, :]

    def first(self, x: Tensor, entries: int) -> Tensor:
        """Takes the first sparse tokens of `x` [batch, length, channels], with at least so many entries if it can."""
        shaped = self.by_token(x)
        if self.sparse is None:  # without a copy of all
            dense = self.dense_of(shaped.shape[1])
            rows = -(-entries // max(1, (shaped.shape[1] - dense) * shaped.shape[2]))
            return shaped[:rows, dense:].flatten(0, 1)[: -(-entries // shaped.shape[2])]
        return self.take(x)[: -(-entries // shaped.shape[2])]

    def share_by_token(self, kept: Tensor, counts: Tensor | None = None) -> Tensor:
        """Gives the share of channels that are not zero, of every sparse token: [tokens] in fp64.

        `counts` [batch, length, 1] says how many are not, where they were counted already.
        """
        if counts is None:
            counts = torch.count_nonzero(self.by_token(kept), -1)[..., None]
        return self.take(counts).flatten().double() / kept.shape[-1]

    def count_kept(self, kept: Tensor, counts: Tensor | None = None) -> Count:
        """Counts the non-zero entries of the sparse tokens of `kept` [batch, length, channels].

        `counts` is that of `share_by_token`.
        """
        if counts is not None:
            return self.of_sparse(counts).sum(dtype=torch.float64)  # whole numbers: exact in any order
        if self.sparse is not None:
            return count(self.take(kept))
        shaped = self.by_token(kept)
        dense = self.dense_of(shaped.shape[1])
        if kept.device.type != "cpu":  # in few launches
            return torch.count_nonzero(shaped.detach(), -1)[:, dense:].sum().double()
        # A slice would be copied first: counting its complement is cheaper.
        return count(kept) - (count(shaped[:, :dense].contiguous()) if dense else 0)


def _as(x: Tensor, y: Tensor) -> Tensor:
    """Gives `y` the shape of `x`."""
    return y if y.shape == x.shape else y.view(x.shape)


def count(x: Tensor) -> Count:
    """Counts the entries of `x` that are neither +0 nor -0; off the CPU as a tensor, which nobody has to wait for."""
    x = x.detach()
    if x.device.type != "cpu":
        return torch.count_nonzero(x).double()
    # numpy counts integers and bools in vectors; torch's count branches at every entry, and half of them are zero.
    if x.element_size() == 2:  # the sign is no part of a zero
        bits = x.contiguous().view(torch.int16).flatten().numpy()
        scratch, total = np.empty(min(CHUNK, len(bits)), np.int16), 0
        for start in range(0, len(bits), CHUNK):  # in pieces that stay in the processor's cache
            part = bits[start : start + CHUNK]
            total += int(np.count_nonzero(np.bitwise_and(part, np.int16(0x7FFF), out=scratch[: len(part)])))
        return total
    return int(np.count_nonzero(x.bool().numpy()))
