"""Splits a causal language model into two steps: tokens to final hidden states, hidden states to logits.

A dense pass is then stored as hidden states, a hundredth of the size of its logits, which come back bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resting.sparsifier.batches import windows_per_forward
from resting.sparsifier.errors import DivergedError, UnsupportedModelError
from resting.sparsifier.evaluating import evaluating


def final_hidden(
    model: Any, ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """Computes the hidden states after the last norm.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    ids : Tensor [batch, length]
    attention_mask : Tensor [batch, length], or [batch, 1, length, length] to be added to the scores
    position_ids : Tensor [batch, length], optional

    Returns
    -------
    Tensor [batch, length, hidden]
    """
    out = model.base_model(input_ids=ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)
    return out.last_hidden_state


FACTORS = ("logit_scale", "lm_head_multiplier")
"""Names, in a config, of what logits are multiplied with."""
DIVISORS = ("logits_scaling",)
CAPS = ("final_logit_softcapping", "logits_soft_cap")


def logits(model: Any, hidden: Tensor) -> Tensor:
    """Computes the logits [..., vocabulary] of `hidden` [..., hidden], in the dtype of the model."""
    config = model.config.get_text_config()
    out: Tensor = model.get_output_embeddings()(hidden)
    for name in FACTORS:
        out = out if (factor := getattr(config, name, None)) is None else out * factor
    for name in DIVISORS:
        out = out if (divisor := getattr(config, name, None)) is None else out / divisor
    for name in CAPS:
        out = cap * torch.tanh(out / cap) if (cap := getattr(config, name, None)) else out
    return out


@torch.no_grad()
def mean_nll(model: Any, windows: Tensor, batch_size: int) -> float:
    """Computes the negative log-likelihood of `windows` [n, length], in nats per token."""
    device = next(model.parameters()).device
    total: float | Tensor = 0.0
    with evaluating(model):
        for ids in windows.to(device).split(windows_per_forward(batch_size, windows.shape[1], model)):
            hidden = final_hidden(model, ids)
            for states, tokens in zip(hidden, ids):
                said = logits(model, states[:-1]).float()
                total = total + F.cross_entropy(said, tokens[1:].to(said.device), reduction="sum").double()
    return float(total) / (len(windows) * (windows.shape[1] - 1))


def check_logits(model: nn.Module) -> None:
    """Makes sure that the two steps are the model.

    Raises
    ------
    DivergedError
        If its logits are NaN or infinite, which equal nothing.
    UnsupportedModelError
        If the model does something to its logits that `logits` does not.
    """
    device = next(model.parameters()).device
    probe = torch.arange(8, device=device)[None]
    with torch.no_grad(), evaluating(model):
        expected = model(input_ids=probe, use_cache=False).logits
        if not bool(torch.isfinite(expected).all()):
            raise DivergedError(
                f"the logits of this {type(model).__name__} are NaN or infinite in {str(expected.dtype)[6:]}: "
                "its weights are damaged, or overflow in this dtype"
            )
        if not torch.equal(expected, logits(model, final_hidden(model, probe)).to(expected.device)):
            raise UnsupportedModelError(
                f"{type(model).__name__} changes its logits after the output layer in a way that is not known here "
                f"(known: {', '.join((*FACTORS, *DIVISORS, *CAPS))})"
            )
