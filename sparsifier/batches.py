"""Says how much goes through a GPU at once: enough that it never waits for this process, and no more than fits."""

from __future__ import annotations

from typing import Any

import torch

TOKENS = 2**15
"""Tokens of a forward on a GPU. A small model of fewer waits for launches; more gain nothing."""
SHARE = 8
"""A forward's activations may take this part of a GPU's memory."""
COPIES = 8
"""Activations of a token that are alive at a time, in widths of the MLP."""
LOGITS = 2**30
"""Bytes of logits in fp32 that are in memory at a time."""
FREE = 0.5
"""Share of a GPU's memory that what is kept for later must leave free, whoever else uses the GPU."""


def windows_per_forward(asked: int, window: int, model: Any) -> int:
    """Return how many windows go through `model` at once: on a CPU as the suite asks, on a GPU at least as many.

    It depends on the model and on the size of the GPU alone, and not on what is free at the time: sums depend on it in
    their last bits.

    Parameters
    ----------
    asked : int
        The suite's.
    window : int
        Tokens of a window.
    model : transformers.PreTrainedModel
    """
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return asked
    config = model.config.get_text_config()
    widest = max(config.hidden_size, getattr(config, "intermediate_size", None) or 0)
    memory = torch.cuda.get_device_properties(weight.device).total_memory
    tokens = min(TOKENS, memory // SHARE // (COPIES * widest * weight.element_size()))
    return max(asked, tokens // window)


def has_room(device: torch.device, size: int) -> bool:
    """Tell whether `size` bytes can be kept on a GPU for later, and enough is left for what runs in between."""
    free, total = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return free + unused - size >= FREE * total
