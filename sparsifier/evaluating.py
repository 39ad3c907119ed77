"""Makes a model compute the same whatever state it is found in, and gives it back in that state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turns dropout, autocast and inference mode off inside the ``with`` block.

    Afterwards every module is in training or in evaluation mode as it was, also after an exception.
    """
    before = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device.type
    gradients = torch.is_grad_enabled()  # leaving inference mode would turn them on
    try:
        for module, _ in before:
            module.training = False
        with torch.autocast(device, enabled=False), torch.inference_mode(False), torch.set_grad_enabled(gradients):
            yield
    finally:
        for module, flag in before:
            module.training = flag
