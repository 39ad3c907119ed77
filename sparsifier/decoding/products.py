"""Prepares products with the active inputs of one token, once for a layer, on the device of its weights."""

from __future__ import annotations

import torch
from torch import Tensor

from resting.sparsifier.decoding.contract import GatedProduct, Product, UnionProduct, check, cutoff_of
from resting.sparsifier.decoding.cpu_products import CpuColumns, CpuRows
from resting.sparsifier.decoding.cpu_quantised_products import CpuQuantised
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.rule import Rule


def columns(weight: Tensor, rule: Rule, bias: Tensor | None = None, threads: int = 1, rests: float = 0.5) -> Product:
    """Prepares the product of a layer's weights [out, in], kept input-major, under `rule`.

    Parameters
    ----------
    weight : Tensor [out, in]
        With the strides of an input-major store: see `input_major`.
    rule : Rule
        Its mask and its low-rank part; its bias is to be in `bias`.
    bias : Tensor [out], optional
    threads : int
        On a CPU.
    rests : float
        Share of the inputs that is expected to rest: on a GPU the form of the product is chosen for it.

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
        from resting.sparsifier.decoding.cuda.single import single_columns

        return single_columns(weight, rule, bias, rests)
    return CpuColumns(weight, cutoff, rule.shift, bias, threads, rule.low_rank)


def quantised_columns(
    held: QuantisedWeight, rule: Rule, dtype: torch.dtype, bias: Tensor | None = None, threads: int = 1
) -> Product:
    """Prepares the product of a layer's quantised weights under `rule`; a product of its own copy of the codes.

    Parameters
    ----------
    held : QuantisedWeight
    rule : Rule
        Its mask and its low-rank part; its bias is to be in `bias`.
    dtype : torch.dtype
        Of inputs and outputs.
    bias : Tensor [out], optional
    threads : int
        On a CPU.

    Raises
    ------
    SparsifierError
        If there is no kernel for the format, the device, the dtype or the rule.
    """
    device = held.codes.device
    check(dtype, device)
    if rule.weight is not None:
        raise SparsifierError(f"a rule with weights of its own has no product with those stored as {held.format.name}")
    if device.type != "cpu":
        raise SparsifierError(f"there is no kernel for {held.format.name} on {device.type} here; allowed: cpu")
    return CpuQuantised(held, dtype, cutoff_of(rule, dtype), rule.shift, bias, threads, rule.low_rank)


def rows(weight: Tensor, rule: Rule, bias: Tensor | None = None, threads: int = 1) -> GatedProduct:
    """Prepares the product of ``up`` [rows, in], output-major, under a mask of the activated gate.

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
    return CpuRows(weight, cutoff, bias, threads)


def takes_batches(weight: Tensor) -> bool:
    """Tells whether there are products of several tokens for weights on this device."""
    return weight.device.type == "cuda"


def union(rule: Rule, weight: Tensor) -> UnionProduct:
    """Prepares products of two to four tokens, each with its own mask under `rule`, for a layer on a GPU.

    Parameters
    ----------
    rule : Rule
    weight : Tensor [out, in]
        Of the layer's shape, dtype and device: its numbers are given with every call.

    Raises
    ------
    SparsifierError
        As `columns`; also for a rule with a low-rank part.
    """
    from resting.sparsifier.decoding.cuda_union import CudaUnion

    return CudaUnion(rule, weight.shape[1], weight.dtype, weight.device)


def union_break_even(weight: Tensor, tokens: int) -> float:
    """Gives the share of inputs at rest for all of `tokens` from which `union` beats the dense product, or above 1."""
    from resting.sparsifier.decoding.cuda_union import choice

    return choice(weight, tokens).least
