"""Independent oracles, written from the formulas; nothing of the project's masking or counting is used."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

LEAVES = {
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}


def linears(model: nn.Module) -> dict[tuple[int, str], nn.Linear]:
    """The block linears by (block, role), from their dotted names."""
    found = {}
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in LEAVES:
            block = int(next(part for part in name.split(".") if part.isdigit()))
            found[block, LEAVES[leaf]] = module
    return found


def hooked(model: nn.Module, ids: Tensor, transform: Callable[[tuple[int, str], Tensor], Tensor], **kwargs) -> Tensor:
    """Logits of a forward in which each linear reads ``transform((block, role), x)``."""
    handles = [
        module.register_forward_pre_hook(lambda m, args, key=key: (transform(key, args[0]),))
        for key, module in linears(model).items()
    ]
    try:
        with torch.no_grad():
            return model(input_ids=ids, **kwargs).logits
    finally:
        for handle in handles:
            handle.remove()


def magnitude(thresholds: dict[tuple[int, str], float], dense: int = 1) -> Callable[[tuple[int, str], Tensor], Tensor]:
    """``x * (|x| > t)`` on all tokens but the first `dense`."""

    def transform(key: tuple[int, str], x: Tensor) -> Tensor:
        out = x * (x.abs() > thresholds[key])
        return torch.cat([x[:, :dense], out[:, dense:]], 1)

    return transform
