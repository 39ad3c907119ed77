"""Computes what training makes small: distances of a sparse model to the dense one, from final hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from resting.sparsifier import logits

CHUNK = 128
"""Tokens whose logits are in memory at a time; eight times as many on a GPU, which waits for launches."""

Objective = Callable[[Any, Tensor, Tensor], tuple[float, Tensor]]
"""From model, dense and sparse hidden states [tokens, hidden] to the mean over tokens and its gradient."""


def forward_kl(model: Any, dense: Tensor, sparse: Tensor) -> tuple[float, Tensor]:
    r"""Computes the mean forward KL and its gradient with respect to the sparse model's hidden states.

    .. math:: KL(softmax(z) \| softmax(\tilde z)), \qquad
              \partial KL / \partial \tilde z = softmax(\tilde z) - softmax(z)

    Parameters
    ----------
    dense, sparse : Tensor [tokens, hidden]
        Final hidden states; z and z~ are their logits.

    Returns
    -------
    loss : float
        In nats per token.
    gradient : Tensor [tokens, hidden]
    """

    def forward(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), log_q.exp() - p

    return _divergence(model, dense, sparse, forward)


def reverse_kl(model: Any, dense: Tensor, sparse: Tensor) -> tuple[float, Tensor]:
    r"""Computes the mean reverse KL, ``KL(softmax(z~) || softmax(z))`` and its gradient, as `forward_kl` does.

    .. math:: \partial KL / \partial \tilde z = q \odot (\log q - \log p - KL), \qquad q = softmax(\tilde z)
    """

    def reverse(log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q, ratio = log_q.exp(), log_q - log_p
        values = (q * ratio).sum(-1)
        return values, q * (ratio - values[:, None])

    return _divergence(model, dense, sparse, reverse)


def hidden_mse(model: Any, dense: Tensor, sparse: Tensor) -> tuple[float, Tensor]:
    """Divides the squared distance of final hidden states by the mean square of the dense ones; it needs no logits."""
    difference = sparse.detach().float() - dense.float()
    scale = dense.float().square().sum(-1).mean()
    loss = difference.square().sum(-1).mean() / scale
    return float(loss), (2 * difference / (scale * len(dense))).to(sparse.dtype)


OBJECTIVES: dict[str, Objective] = {"forward-kl": forward_kl, "reverse-kl": reverse_kl, "hidden-mse": hidden_mse}


def _divergence(
    model: Any, dense: Tensor, sparse: Tensor, values_and_slope: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
) -> tuple[float, Tensor]:
    total, gradients = torch.zeros((), dtype=torch.float64, device=dense.device), []
    chunk = CHUNK if dense.device.type == "cpu" else 8 * CHUNK
    for teacher, student in zip(dense.split(chunk), sparse.detach().split(chunk)):
        with torch.no_grad():
            log_p = logits(model, teacher).float().log_softmax(-1)
        student = student.requires_grad_()
        with torch.enable_grad():
            z = logits(model, student)
        with torch.no_grad():
            values, slope = values_and_slope(log_p, z.float().log_softmax(-1))
            total += values.double().sum()
        gradients.append(torch.autograd.grad(z, student, (slope / len(dense)).to(z.dtype))[0])
    return float(total) / len(dense), torch.cat(gradients)
