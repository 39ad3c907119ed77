"""Adds up over the vocabulary on a GPU, in one reading of the logits of two models."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 2048
WARPS = 8
CLOSE = 1e-3
"""Greatest distance from plain torch on the probe, in nats."""


@triton.jit
def _divergence(dense, sparse, following, nll, kl, vocabulary, BLOCK: tl.constexpr):
    """Sums in every lane against the greatest logits that it has seen so far, and joins the lanes at the end."""
    token = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    p, q = dense + token * vocabulary, sparse + token * vocabulary
    top_p = tl.full([BLOCK], -3.0e38, tl.float32)
    top_q = tl.full([BLOCK], -3.0e38, tl.float32)
    sum_p = tl.zeros([BLOCK], tl.float32)
    sum_q = tl.zeros([BLOCK], tl.float32)
    apart = tl.zeros([BLOCK], tl.float32)
    for start in range(0, vocabulary, BLOCK):
        k = start + lane
        inside = k < vocabulary
        x = tl.load(p + k, mask=inside, other=float("-inf")).to(tl.float32)
        y = tl.load(q + k, mask=inside, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top_p, x)
        shrunk, weight = tl.exp(top_p - higher), tl.exp(x - higher)
        sum_p = sum_p * shrunk + weight
        apart = apart * shrunk + tl.where(inside, weight * (x - y), 0.0)
        top_p = higher
        higher = tl.maximum(top_q, y)
        sum_q = sum_q * tl.exp(top_q - higher) + tl.exp(y - higher)
        top_q = higher
    most_p, most_q = tl.max(top_p, 0), tl.max(top_q, 0)
    shrunk = tl.exp(top_p - most_p)
    all_p, all_q = tl.sum(sum_p * shrunk, 0), tl.sum(sum_q * tl.exp(top_q - most_q), 0)
    # KL(p || q) = sum p (x - y) - (log-sum-exp of x - that of y)
    tl.store(kl + token, tl.sum(apart * shrunk, 0) / all_p - (most_p - most_q) - (tl.log(all_p) - tl.log(all_q)))
    chosen = tl.load(q + tl.load(following + token)).to(tl.float32)
    tl.store(nll + token, most_q - chosen + tl.log(all_q))


def nll_and_kl(dense: Tensor, sparse: Tensor, following: Tensor) -> tuple[Tensor, Tensor]:
    """Computes negative log-likelihood and KL(dense || sparse) of every token, in nats.

    Parameters
    ----------
    dense, sparse : Tensor [tokens, vocabulary]
        Logits, contiguous.
    following : Tensor [tokens] of int64
        The tokens that come next.

    Returns
    -------
    nll, kl : Tensor [tokens] in fp32
        NaN where a logit is NaN or infinite.
    """
    tokens, vocabulary = sparse.shape
    nll = torch.empty(tokens, dtype=torch.float32, device=sparse.device)
    kl = torch.empty_like(nll)
    with torch.cuda.device_of(sparse):
        _divergence[(tokens,)](dense, sparse, following, nll, kl, vocabulary, BLOCK=BLOCK, num_warps=WARPS)
    return nll, kl


@cache
def works(device: torch.device) -> bool:
    """Tells whether the kernel can be compiled and run on `device`, and gives there what plain torch does."""
    x = torch.linspace(-9, 9, 2 * 100, device=device).reshape(2, 100).bfloat16()
    y, following = x.flip(1), torch.tensor([3, 97], device=device)
    try:
        nll, kl = nll_and_kl(x, y, following)
    except Exception:  # of a compiler, a driver or Triton itself, each in its own way
        return False
    log_p, log_q = x.float().log_softmax(-1), y.float().log_softmax(-1)
    found = torch.stack([nll, kl])
    expected = torch.stack([-log_q.gather(1, following[:, None])[:, 0], (log_p.exp() * (log_p - log_q)).sum(-1)])
    return torch.allclose(found, expected, atol=CLOSE, rtol=CLOSE)
