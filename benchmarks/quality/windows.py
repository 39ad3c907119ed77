"""Cuts the documents of a text into token windows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.assets import texts
from resting.benchmarks.errors import AssetError


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


def windows_of(name: str, split: str, tokenizer: Any, length: int, count: int | None, seed: int = 0) -> Windows:
    """Cut a text into windows of `length` tokens without overlap, and draw a seeded sample of `count` (all where None).

    A tokenizer that begins texts with a BOS token gets one at the start of every window.
    """
    text = "\n\n".join(texts.documents(name, split))
    begin = _begin(tokenizer)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    body = length - len(begin)
    available = len(ids) // body
    if not available:
        raise AssetError(f"{name} has {len(ids)} tokens, less than one window of {length}")
    cut = ids[: available * body].view(available, body)
    if count is not None and count < available:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        cut = cut[order[:count].sort().values]
    return Windows(torch.cat([torch.tensor(begin).long().expand(len(cut), -1), cut], 1), available)


def _begin(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []
