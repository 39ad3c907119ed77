"""What is kept of the dense model is that of the tokens that are asked for."""

from __future__ import annotations

import torch
from families import build

from resting.benchmarks.quality import perplexity


def test_pieces_of_one_window_are_not_those_of_several():
    """Another token policy may end and begin a piece at the same tokens, with more windows in it."""
    model = build("llama")
    ids = torch.randint(5, 97, (3, 12), generator=torch.Generator().manual_seed(0))
    reference = perplexity.DenseReference(model, ids, 3)
    one = reference.teacher(0, slice(0, 1), slice(4, 9), as_logits=False)
    three = reference.teacher(0, slice(0, 3), slice(4, 9), as_logits=False)
    expected = model(ids).logits.log_softmax(-1)[:, 4:9].flatten(0, 1)
    assert torch.allclose(one, expected[:5], atol=1e-5)
    assert three.shape == expected.shape
    assert torch.allclose(three, expected, atol=1e-5)
