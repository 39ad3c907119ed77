"""Cuts the documents of a text into token windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.assets import texts
from resting.benchmarks.cells.suite import Bos
from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality.bos import beginning
from resting.benchmarks.quality.tokens import ids_of


@dataclass(frozen=True)
class Windows:
    """Holds the token windows of a text.

    Attributes
    ----------
    ids : Tensor [n, length]
    available : int
        How many windows the text has.
    """

    ids: Tensor
    available: int


def windows_of(
    name: str,
    split: str,
    tokenizer: Any,
    length: int,
    count: int | None,
    seed: int = 0,
    bos: Bos = "auto",
    stride: int | None = None,
    own: texts.Own | None = None,
) -> Windows:
    """Cut a text into windows of `length` tokens, and draw a seeded sample of `count` (all where None).

    Parameters
    ----------
    bos : {"auto", "always", "never"}
        What every window begins with (`bos.beginning`).
    stride : int, optional
        Begin a window every so many tokens of the text, which has its BOS token at its own start alone. Without it
        windows do not overlap, and each has a BOS token of its own.
    own : Own, optional
        Of a text of the user's own.
    """
    text = "\n\n".join(texts.documents(name, split, own))
    begin = torch.tensor(beginning(tokenizer, bos)).long()
    ids = ids_of(text, tokenizer)
    if stride is not None:
        ids, begin = torch.cat([begin, ids]), begin[:0]
    body = length - len(begin)
    if len(ids) < body:
        raise AssetError(f"{name} has {len(ids)} tokens for {split}, and one window takes {length}; allowed: more text")
    cut = ids.unfold(0, body, body if stride is None else stride)
    available = len(cut)
    if count is not None and count < available:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        cut = cut[order[:count].sort().values]
    return Windows(torch.cat([begin.expand(len(cut), -1), cut], 1), available)
