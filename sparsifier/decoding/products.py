"""Products with the active inputs of one token, prepared once for a layer, on whatever device its weights are."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Rule, Vector

DTYPES = {"cpu": (torch.float32, torch.bfloat16), "cuda": (torch.bfloat16, torch.float16)}


class Product(Protocol):
    """A prepared product of one token."""

    def __call__(self, x: Tensor) -> Tensor:
        """Product [..., out] with `x` [..., in] of one token."""
        ...


class GatedProduct(Protocol):
    """A prepared product of one token, times a gate whose resting rows are not read."""

    def __call__(self, x: Tensor, gate: Tensor) -> Tensor:
        """``gate * (W x + bias)`` where ``|gate|`` is above the cutoff, else 0; `gate` [..., rows] of one token."""
        ...


def columns(weight: Tensor, rule: Rule, bias: Tensor | None = None, threads: int = 1) -> Product:
    """The product of a layer's weights [out, in], kept input-major, under `rule`.

    Parameters
    ----------
    weight : Tensor [out, in]
        With the strides of an input-major store: see `input_major`.
    rule : Rule
        Its mask and its low-rank part; its bias is to be in `bias`.
    bias : Tensor [out], optional
    threads : int
        On a CPU.

    Raises
    ------
    SparsifierError
        If there is no kernel for the device, the dtype or the rule.
    """
    check(weight.dtype, weight.device)
    if not weight.t().is_contiguous():
        raise SparsifierError("column kernels take input-major weights: see `input_major`")
    cutoff = cutoff_of(rule, weight.dtype)
    if weight.device.type == "cuda":
        from resting.sparsifier.decoding.cuda_products import CudaColumns

        return CudaColumns(weight, [(weight.shape[0], rule)], bias)
    from resting.sparsifier.decoding.cpu_products import CpuColumns

    return CpuColumns(weight, cutoff, rule.shift, bias, threads, rule.low_rank)


def rows(weight: Tensor, rule: Rule, bias: Tensor | None = None, threads: int = 1) -> GatedProduct:
    """The product of ``up`` [rows, in], output-major, under a mask of the activated gate.

    Raises
    ------
    SparsifierError
        As `columns`.
    """
    check(weight.dtype, weight.device)
    cutoff = cutoff_of(rule, weight.dtype)
    if weight.device.type == "cuda":
        from resting.sparsifier.decoding.cuda_products import CudaRows

        return CudaRows(weight, cutoff, bias)
    from resting.sparsifier.decoding.cpu_products import CpuRows

    return CpuRows(weight, cutoff, bias, threads)


def input_major(weight: Tensor) -> Tensor:
    """`weight` [out, in] with the weights of every input in one contiguous run; the same numbers, as a view."""
    return weight.t().contiguous().t()


def check(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse what no kernel takes.

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
    """The threshold that kernels compare with.

    Raises
    ------
    SparsifierError
        If the rule has none, or has what kernels do not compute together.
    """
    if rule.topk is not None:
        raise SparsifierError("decode kernels compare with a threshold: a rule with topk has none")
    if rule.low_rank is not None and bool(torch.as_tensor(rule.shift).any()):
        raise SparsifierError("decode kernels take a shift or a low-rank part, not both")
    return rule.cutoff(dtype)
