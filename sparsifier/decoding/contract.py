"""Says what every decode kernel takes and gives: weights, dtypes, cutoffs and prepared products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.mask_functions import THRESHOLD
from resting.sparsifier.projection import Projection
from resting.sparsifier.rule import Rule, Vector

MOST_TOKENS = 4
"""Tokens of a batch that a product takes together, at most."""
DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}


class Product(Protocol):
    """Describes a prepared product of one token."""

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the product [..., out] with `x` [..., in] of one token."""
        ...


class GatedProduct(Protocol):
    """Describes a prepared product of one token, times a gate whose resting rows are not read."""

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """Computes ``gate * (W x + bias)`` where ``|gate|`` exceeds the cutoff, else 0; `gate` is [..., rows]."""
        ...


class UnionProduct(Protocol):
    """Describes prepared products of several tokens, each with its own mask."""

    def __call__(self, x: Tensor, weight: Tensor, start: Tensor | None = None) -> Tensor:
        """Computes the products [..., out] with `x` [..., in], input-major weights [out, in] and what is added."""
        ...


def input_major(weight: Tensor) -> Tensor:
    """Stores the weights of every input in one contiguous run, and gives them as a view [out, in]."""
    return weight.t().contiguous().t()


def keep_in_order(weight: Tensor, order: Callable[[Tensor], Tensor]) -> None:
    """Stores the numbers of a parameter in another order, in its place.

    A parameter that was made in inference mode gets numbers that were, too: with others it would be neither, and no
    forward could read it any more.

    Parameters
    ----------
    weight : Tensor [out, in]
    order : callable
        Gives the same numbers, stored as they are to be: `input_major`, say.
    """
    with torch.inference_mode(weight.is_inference()), torch.no_grad():
        weight.data = order(weight.data)


def weight_of(matrix: Projection, rule: Rule) -> Tensor:
    """Gives the weights [out, in] that sparse tokens read under `rule`: its own, as the model's lie, or the model's."""
    return matrix.weight if rule.weight is None else rule.weight.detach().to(matrix.weight)


def check(dtype: torch.dtype, device: torch.device) -> None:
    """Refuses a device or dtype that no kernel takes.

    Raises
    ------
    SparsifierError
    """
    if device.type not in DTYPES:
        raise SparsifierError(f"there are decode kernels for {' and '.join(DTYPES)}, not for {device.type}")
    allowed = DTYPES[device.type]
    if dtype not in allowed:
        names = ", ".join(str(d).removeprefix("torch.") for d in allowed)
        name = str(dtype).removeprefix("torch.")
        raise SparsifierError(f"decode kernels on {device.type} take {names}, not {name}")


def cutoff_of(rule: Rule, dtype: torch.dtype) -> Vector:
    """Gives the threshold that kernels compare with.

    Raises
    ------
    SparsifierError
        If the rule has none, or has what kernels do not compute together.
    """
    if rule.topk is not None:
        raise SparsifierError("decode kernels compare with a threshold: a rule with topk has none")
    if rule.mask != THRESHOLD:
        raise SparsifierError(
            f"decode kernels compare with a threshold known before the token: a rule with mask {rule.mask!r} has none"
        )
    if rule.rescale:
        raise SparsifierError("decode kernels do not rescale what is kept: a rule with rescale has no decode kernel")
    if rule.low_rank is not None and rule.shifts:
        raise SparsifierError("decode kernels take a shift or a low-rank part, not both")
    return rule.cutoff(dtype)
