"""Tells whether sequences may share a row of a model, by trying it."""

from __future__ import annotations

from typing import Any

import torch

from resting.benchmarks.quality.tasks.packing import batches, packed
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.logits import final_hidden

PROBE = [(3, 4, 5, 6, *range(first, first + length)) for first, length in ((7, 9), (20, 8), (30, 7))] + [(8, 9, 10)]
"""Sequences with a common beginning, and one that has a row of its own, and padding there."""
SHIFTS = (0.0, 0.25, 0.5, 0.75)
"""Shares of the vocabulary by which the probe's tokens are moved for another try.

What sequences see of one another they see with any tokens. Rounding in half precision blows up with some: with the
first ids of the default model, which are special tokens, a hidden state moved by twice its size.
"""
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Difference of a token's hidden state, over its size, that is rounding; 0.05 in half precision."""


@torch.no_grad()
def may_share_rows(model: Any) -> bool:
    """Whether packed sequences have the hidden states that they have alone.

    A mixer with a state carries it from one sequence to the next, a sliding window sees tokens of others, and
    positions may be counted from the mask: such models get one sequence a row. What has no effect in a short probe, a
    window longer than it, is looked up in the config.
    """
    if _has_sliding_window(model):
        return False
    size: int = model.config.get_text_config().vocab_size
    with evaluating(model):
        return any(_is_the_same(model, _moved(int(share * size), size)) for share in SHIFTS)


def _moved(by: int, size: int) -> list[tuple[int, ...]]:
    return [tuple((token + by) % size for token in tokens) for tokens in PROBE]


def _is_the_same(model: Any, probe: list[tuple[int, ...]]) -> bool:
    """Whether the sequences of `probe` have the hidden states that they have alone."""
    device = next(model.parameters()).device
    (batch,) = batches(packed(probe, 100), 10**6)
    ids, mask = batch.ids.to(device), batch.attention_mask(model.dtype).to(device)
    alone = [final_hidden(model, torch.tensor([tokens], device=device))[0] for tokens in probe]
    try:
        together = final_hidden(model, ids, mask, batch.positions.to(device))
    except Exception:  # it takes no such mask, or no positions
        return False
    for number, states in enumerate(alone):
        (row,) = [row for row, places in enumerate(batch.places) if number in places]
        found = together[row, batch.places[row][number]]
        difference = (found.float() - states.float()).norm(dim=-1) / states.float().norm(dim=-1)
        if not bool((difference <= CLOSE.get(states.dtype, 0.05)).all()):
            return False
    return True


def _has_sliding_window(model: Any) -> bool:
    """Whether some layer sees only the last tokens, or is none of full attention."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is not None
    return any(kind != "full_attention" for kind in kinds)
