"""Forward KL between a dense and a sparse model, from their final hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparsifier.logits import logits

CHUNK = 128
"""Tokens whose logits are in memory at a time."""


def forward_kl(model: Any, dense: Tensor, sparse: Tensor) -> tuple[float, Tensor]:
    r"""Mean forward KL, and its gradient with respect to the sparse model's hidden states.

    .. math:: KL(softmax(z) \| softmax(\tilde z)), \qquad
              \partial KL / \partial \tilde z = softmax(\tilde z) - softmax(z)

    Parameters
    ----------
    dense, sparse : Tensor [tokens, hidden]
        Final hidden states; z and z~ are their logits.

    Returns
    -------
    loss : float
        In nats a token.
    gradient : Tensor [tokens, hidden]
    """
    total, gradients = 0.0, []
    for teacher, student in zip(dense.split(CHUNK), sparse.detach().split(CHUNK)):
        with torch.no_grad():
            log_p = logits(model, teacher).float().log_softmax(-1)
        student = student.requires_grad_()
        with torch.enable_grad():
            z = logits(model, student)
        with torch.no_grad():
            log_q = z.float().log_softmax(-1)
            p = log_p.exp()
            total += float((p * (log_p - log_q)).sum(-1).double().sum())
            slope = (log_q.exp_() - p) / len(dense)
        gradients.append(torch.autograd.grad(z, student, slope.to(z.dtype))[0])
    return total / len(dense), torch.cat(gradients)
