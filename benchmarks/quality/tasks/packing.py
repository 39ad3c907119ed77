"""Packs requests that share a beginning into one row, in which each sees only its own branch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 2048
"""Tokens of a row that several sequences are packed into."""
QUADRATIC = 1500.0
"""Tokens of a row at which its attention costs as much as everything else, roughly, for a small model on a CPU."""


@dataclass(frozen=True)
class Pack:
    """Holds sequences with a common prefix.

    Attributes
    ----------
    prefix : tuple of int
    branches : list of tuple of int
        What each sequence goes on with.
    numbers : list of int
        Which sequence each branch is.
    """

    prefix: tuple[int, ...]
    branches: list[tuple[int, ...]]
    numbers: list[int]

    @property
    def length(self) -> int:
        """Tokens of the row."""
        return len(self.prefix) + sum(len(branch) for branch in self.branches)


def packed(sequences: Sequence[tuple[int, ...]], longest: int = LONGEST) -> list[Pack]:
    """Pack `sequences`, all different, so that few tokens run twice; without any sharing where `longest` is 0.

    Neighbours in lexicographic order share the most. A sequence joins the pack before it where that costs less than a
    row of its own: fewer tokens, but attention over a longer row.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i])
    packs: list[list[int]] = []
    shared = 0
    for number in order:
        sequence = sequences[number]
        if packs and longest:
            members = packs[-1]
            common = min(shared, _common(sequences[members[0]], sequence))
            length = shared + sum(len(sequences[m]) - shared for m in members)
            together = common + sum(len(sequences[m]) - common for m in (*members, number))
            if together <= longest and _cost(together) < _cost(length) + _cost(len(sequence)):
                members.append(number)
                shared = common
                continue
        packs.append([number])
        shared = len(sequence)
    return [_pack(sequences, members) for members in packs]


def _cost(length: int) -> float:
    return length + length**2 / QUADRATIC


def _pack(sequences: Sequence[tuple[int, ...]], members: list[int]) -> Pack:
    first = sequences[members[0]]
    shared = min(_common(first, sequences[m]) for m in members)
    return Pack(first[:shared], [sequences[m][shared:] for m in members], members)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return i
    return min(len(a), len(b))


@dataclass(frozen=True)
class Batch:
    """Holds the rows of one forward.

    Attributes
    ----------
    ids, positions : Tensor [rows, length]
        Padding has position -1.
    branch : Tensor [rows, length]
        0 in the prefix, from 1 in the branches, -1 in padding.
    places : list of dict
        For every row: from the number of a sequence to the places of its tokens in the row.
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    places: list[dict[int, list[int]]]

    @property
    def is_plain(self) -> bool:
        """Whether every row is one sequence: an ordinary padded batch."""
        return bool((self.branch <= 0).all())

    def padding_mask(self) -> Tensor:
        """Return the mask [rows, length], 1 for real tokens."""
        return (self.positions >= 0).long()

    def attention_mask(self, dtype: torch.dtype) -> Tensor:
        """Return what is added to scores, [rows, 1, length, length]: a token sees its prefix and its branch."""
        causal = self.positions[:, :, None] >= self.positions[:, None, :]
        own = self.branch[:, :, None] == self.branch[:, None, :]
        seen = causal & (own | (self.branch[:, None, :] == 0))
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def batches(packs: Sequence[Pack], tokens: int) -> Iterator[Batch]:
    """Yield batches of packs of about the same length, of at most `tokens` tokens with padding (or of one row)."""
    rows: list[Pack] = []
    for pack in sorted(packs, key=lambda p: -p.length):
        if rows and (len(rows) + 1) * rows[0].length > tokens:
            yield _batch(rows)
            rows = []
        rows.append(pack)
    if rows:
        yield _batch(rows)


def _batch(rows: list[Pack]) -> Batch:
    shape = (len(rows), max(pack.length for pack in rows))
    ids, positions, branch = torch.zeros(shape).long(), torch.full(shape, -1), torch.full(shape, -1)
    places: list[dict[int, list[int]]] = []
    for row, pack in enumerate(rows):
        end = begin = len(pack.prefix)
        ids[row, :end] = torch.tensor(pack.prefix, dtype=torch.long)
        positions[row, :end] = torch.arange(end)
        branch[row, :end] = 0
        # A row of one sequence is all prefix: it needs no mask of its own.
        of: dict[int, list[int]] = {}
        for index, (tail, number) in enumerate(zip(pack.branches, pack.numbers), 1):
            stop = begin + len(tail)
            ids[row, begin:stop] = torch.tensor(tail, dtype=torch.long)
            positions[row, begin:stop] = torch.arange(end, end + len(tail))
            branch[row, begin:stop] = index
            of[number] = [*range(end), *range(begin, stop)]
            begin = stop
        places.append(of)
    return Batch(ids, positions, branch, places)
