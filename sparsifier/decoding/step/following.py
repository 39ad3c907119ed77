"""Keeps the neuron masks of a step those of the sequence whose tokens it computes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.neurons.down import NeuronDown
from resting.sparsifier.neurons.mask import NeuronMask
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker


def is_known(mask: NeuronMask) -> bool:
    """Tells whether a step on a CPU takes a mask: one that stays for a sequence, or one of two scores of a token."""
    by_up = mask.score == "up" and mask.threshold is not None
    return not mask.known.by_token or by_up or mask.score == "clusters-head"


class StepTracker(TokenTracker):
    """Tracks tokens that a step computes as well, past the trunk and its hooks."""

    def one_token(self, cache: Any) -> None:
        """Takes up one token after those of `cache`."""
        self._before_forward(nn.Identity(), (torch.zeros(1, 1),), {"past_key_values": cache})


def following(
    tracker: StepTracker, kept: Mapping[Site, Tensor], modules: Mapping[Site, NeuronDown]
) -> Callable[[Any], None]:
    """Makes what is to be called with the cache before a step computes a token: it brings masks up to date.

    What is called raises `SparsifierError` where the tokens of a cache did not all come through the plan, as the
    definition does.
    """
    stay = {site: module for site, module in modules.items() if not module.mask.known.by_token}
    versions = dict.fromkeys(stay, -1)

    def follow(cache: Any) -> None:
        tracker.one_token(cache)
        for site, module in stay.items():
            version, keep = module.of_sequence()
            if version != versions[site]:
                kept[site].copy_(keep)
                versions[site] = version

    return follow
