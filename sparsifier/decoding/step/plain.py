"""Computes a block in plain torch, from its form: what forms are verified by."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.decoding.step.form import ACTIVATIONS, AttentionForm, BlockForm, Norm

Layer = tuple[Tensor, Tensor | None]
"""Weight [out, in] and bias [out]."""


def block(form: BlockForm, layers: Mapping[str, Layer], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes a block for a sequence that begins with these tokens.

    Parameters
    ----------
    form : BlockForm
    layers : dict of str to (Tensor, Tensor or None)
        By role; fused ones are taken apart.
    x : Tensor [tokens, width]
    cos, sin : Tensor [tokens, rotary]

    Returns
    -------
    Tensor [tokens, width]
    """
    y = attention(form.attention, layers, _normed(form.before_attention, x), cos, sin)
    x = x + _normed(form.after_attention, y) * form.residual
    y = _normed(form.before_mlp, x)
    opened = ACTIVATIONS[form.activation](F.linear(y, *layers["gate"])) * F.linear(y, *layers["up"])
    return x + _normed(form.after_mlp, F.linear(opened, *layers["down"])) * form.residual


def attention(form: AttentionForm, layers: Mapping[str, Layer], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Computes causal attention of a sequence [tokens, width]."""
    n = x.shape[0]
    counts = {"q": form.heads, "k": form.groups, "v": form.groups}
    flat = {role: F.linear(x, *layers[role]) for role in counts}
    norms = {"q": form.q_norm, "k": form.k_norm}
    if form.norm_of_all:
        flat |= {role: _normed(norm, flat[role]) for role, norm in norms.items()}
    split = {role: flat[role].view(n, count, form.size) for role, count in counts.items()}
    if not form.norm_of_all:
        split |= {role: _normed(norm, split[role]) for role, norm in norms.items()}
    q, k = (turned(split[role], cos, sin, form.rotary) for role in "qk")
    k, v = (t.repeat_interleave(form.heads // form.groups, 1) for t in (k, split["v"]))
    scores = torch.einsum("qhd,khd->hqk", q, k) * form.scaling
    if form.softcap:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    distance = torch.arange(n, device=x.device)[:, None] - torch.arange(n, device=x.device)[None]
    seen = (distance >= 0) & (distance < (form.window or n))
    weights = scores.masked_fill(~seen, -torch.inf).float().softmax(-1).to(v.dtype)
    return F.linear(torch.einsum("hqk,khd->qhd", weights, v).flatten(1), *layers["o"])


def turned(heads: Tensor, cos: Tensor, sin: Tensor, rotary: int) -> Tensor:
    """Turns the first `rotary` numbers of every head [tokens, heads, size] by the rotary embedding."""
    if not rotary:
        return heads
    first, rest = heads[..., :rotary], heads[..., rotary:]
    low, high = first.chunk(2, -1)
    first = first * cos[:, None] + torch.cat([-high, low], -1) * sin[:, None]
    return torch.cat([first, rest], -1)


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)
