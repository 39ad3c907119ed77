"""Refuses models whose linear layers do not multiply by the weights that they show."""

from __future__ import annotations

from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.experts import Experts
from resting.sparsifier.policy import Selection
from resting.sparsifier.projection import Projection, is_linear
from resting.sparsifier.roles import LINEAR_ROLES
from resting.sparsifier.sites import Site
from resting.sparsifier.sparse_experts import dense_product, run_experts

_tried: WeakSet[nn.Module] = WeakSet()
_checked: WeakSet[Decoder] = WeakSet()
"""`Decoder.of` makes a new one where a layer or the kind of a weight has changed."""
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
    if decoder in _checked:
        return
    seen: dict[tuple[int, str, int | None], Site] = {}
    checked: dict[int, str] = {}
    for site in decoder.sites(LINEAR_ROLES):
        matrix = decoder.projection(site)
        module = matrix.module
        if id(module) not in checked:
            checked[id(module)] = _reason(module) if is_linear(module) else _reason_of_experts(module)
        if reason := checked[id(module)]:
            raise UnsupportedModelError(f"the layer at {site} is a {type(module).__name__} {reason}")
        first = seen.setdefault((id(module), matrix.name, matrix.expert), site)
        if first != site:
            raise UnsupportedModelError(f"one layer stands at {first} and at {site}: a rule belongs to one site")
    check_experts(decoder)
    if all(_has_plain_forward(decoder.projection(site).module) for site in decoder.sites(LINEAR_ROLES)):
        _checked.add(decoder)


def _has_plain_forward(linear: nn.Module) -> bool:
    return type(linear).forward in (nn.Linear.forward, Conv1D.forward)


def check_experts(decoder: Decoder) -> None:
    """Makes sure that experts compute what `run_experts` does.

    Raises
    ------
    UnsupportedModelError
    """
    for block, found in enumerate(decoder.found):
        if found.experts is not None and found.experts.module not in _tried:
            if not _computes_experts(found.experts, block):
                kind = type(found.experts.module).__name__
                raise UnsupportedModelError(f"{kind} in block {block} computes something else than gated experts do")
            _tried.add(found.experts.module)


@torch.no_grad()
def _computes_experts(experts: Experts, block: int) -> bool:
    """Tries experts on a few random tokens, up to rounding."""
    matrix = experts.projection(experts.roles[0], 0)
    like, generator = matrix.weight, torch.Generator().manual_seed(0)
    x = torch.randn(4, matrix.in_features, generator=generator).to(like)
    chosen = torch.rand(4, experts.count, generator=generator).topk(experts.per_token).indices.to(like.device)
    weights = torch.full(chosen.shape, 0.5).to(like)
    try:
        given = experts.module(x, chosen, weights)
    except Exception:  # it is called with something else
        return False
    wanted = run_experts(
        experts,
        block,
        x,
        chosen,
        weights,
        Selection(0, shape=(1, 4)),
        lambda site, projection, x, selection: dense_product(projection, x),
        lambda site, x, selection: x,
    )
    rounding = max(1e-4, 8 * torch.finfo(like.dtype).eps) * float(wanted.abs().max())
    return given.shape == wanted.shape and torch.allclose(given, wanted, rtol=0.0, atol=rounding)


def _reason_of_experts(module: nn.Module) -> str:
    """Says why the weights of experts are not what they look like, or nothing."""
    for name, weight in module.named_parameters(recurse=False):
        if reason := _reason_of_weight(weight, name):
            return reason
    return ""


def _reason_of_weight(weight: Tensor, name: str = "weight") -> str:
    if weight.device.type == "meta":
        return f"whose {name} is on the meta device or offloaded: load the model into memory"
    if type(weight) not in (Tensor, nn.Parameter):
        return f"whose {name} is a {type(weight).__name__}, not a plain tensor: load the model dequantised"
    if weight.dtype not in DTYPES:
        allowed = ", ".join(str(dtype)[6:] for dtype in DTYPES)
        return f"whose {name} is {str(weight.dtype)[6:]}; allowed: {allowed}: load the model dequantised"
    return ""


def _reason(linear: nn.Module) -> str:
    """Says why `linear` is not what it looks like, or nothing."""
    if reason := _reason_of_weight(linear.weight):  # type: ignore[arg-type]
        return reason
    matrix = Projection.of(linear)
    wanted = [matrix.out_features, matrix.in_features]
    held = [n for n, _ in (*linear.named_parameters(), *linear.named_buffers()) if n not in ("weight", "bias")]
    if list(matrix.weight.shape) != wanted:
        found = list(matrix.weight.shape)
        return f"whose weight is {found} and not {wanted}: load the model dequantised and in one piece"
    if held:
        return f"that holds {', '.join(held)} beside weight and bias: load the model dequantised, or merge them"
    if not _has_plain_forward(linear) and not _computes_linear(linear, matrix):
        return "that computes something else than a linear layer: load the model with plain linear layers"
    return ""


@torch.no_grad()
def _computes_linear(linear: nn.Module, matrix: Projection) -> bool:
    """Tries whether a forward of its own is that of a linear layer, up to rounding."""
    weight, device = matrix.weight, matrix.weight.device
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, matrix.in_features, generator=generator).to(device, weight.dtype)
    given, wanted = linear(x), F.linear(x, weight, matrix.bias)
    rounding = max(1e-5, 8 * torch.finfo(weight.dtype).eps) * float(wanted.abs().max())
    return given.shape == wanted.shape and torch.allclose(given, wanted, rtol=0.0, atol=rounding)
