"""Rules whose sites have weights of their own."""

from __future__ import annotations

import torch

from resting.sparsifier import Decoder, Plan, Rule
from resting.sparsifier.fingerprint import of_model


def with_weights(model, more=()):
    """A plan with weights of its own at every second site, and the rules `more`."""
    decoder, random = Decoder.of(model), torch.Generator().manual_seed(5)
    rules = {}
    for i, site in enumerate(decoder.sites()):
        out, inputs = decoder.projection(site).weight.shape
        weight = 0.15 * torch.randn(out, inputs, generator=random) if i % 2 == 0 else None
        rules[site] = Rule(threshold=0.05 * (i % 3), weight=weight, bias=0.1 * torch.ones(out))
    return Plan(rules | dict(more), "x", 0.3, 0.3, of_model(model))
