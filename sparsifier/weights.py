"""Refuses models whose linear layers do not multiply by the weights that they show."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.sites import LINEAR_ROLES, Decoder, Site

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_weights(decoder: Decoder) -> None:
    """Makes sure that every block linear is ``x @ weight.T + bias`` with floating-point numbers in memory.

    Norms, low-rank parts and products with weights are taken from ``linear.weight``: of a quantised layer these would
    be of codes without their scales.

    Raises
    ------
    UnsupportedModelError
        If a layer is quantised, parametrised, not loaded, or stands at two sites.
    """
    seen: dict[int, Site] = {}
    for site in decoder.sites(LINEAR_ROLES):
        linear = decoder.linear(site)
        if reason := _reason(linear):
            raise UnsupportedModelError(f"the layer at {site} is a {type(linear).__name__} {reason}")
        first = seen.setdefault(id(linear), site)
        if first != site:
            raise UnsupportedModelError(f"one layer stands at {first} and at {site}: a rule belongs to one site")


def _reason(linear: nn.Linear) -> str:
    """Says why `linear` is not what it looks like, or nothing."""
    weight = linear.weight
    held = [n for n, _ in (*linear.named_parameters(), *linear.named_buffers()) if n not in ("weight", "bias")]
    if weight.device.type == "meta":
        return "whose weight is on the meta device or offloaded: load the model into memory"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"whose weight is a {type(weight).__name__}, not a plain tensor: load the model dequantised"
    if weight.dtype not in DTYPES:
        allowed = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        return f"whose weight is {str(weight.dtype)[6:]}; allowed: {allowed}: load the model dequantised"
    if tuple(weight.shape) != (linear.out_features, linear.in_features):
        wanted = [linear.out_features, linear.in_features]
        return f"whose weight is {list(weight.shape)} and not {wanted}: load the model dequantised and in one piece"
    if held:
        return f"that holds {', '.join(held)} beside weight and bias: load the model dequantised, or merge them"
    if type(linear).forward is not nn.Linear.forward:
        return "that computes something else than a linear layer: load the model with plain linear layers"
    return ""
