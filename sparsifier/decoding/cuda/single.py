"""Prepares the product of a single layer on a GPU: by a compiled kernel where that is faster, else in Triton."""

from __future__ import annotations

import itertools
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from resting.sparsifier.decoding.cuda.choice import COMPILED, FORMS, SINGLE, SLOWER, fastest, in_triton
from resting.sparsifier.decoding.cuda.compiled import missing
from resting.sparsifier.decoding.cuda.products import VotingColumns, check_shapes
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.decoding.cuda.variant import Tile
from resting.sparsifier.decoding.cuda_products import CudaColumns
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Rule

_numbers = itertools.count()
_products: WeakValueDictionary[int, CompiledColumns] = WeakValueDictionary()


class CompiledColumns(nn.Module):
    """Computes what `CudaColumns` does for one layer, by a compiled kernel; registered with torch as an operator.

    Parameters are those of `VotingColumns`.
    """

    def __init__(self, weight: Tensor, rule: Rule, bias: Tensor | None, tile: Tile) -> None:
        super().__init__()
        self.product = VotingColumns(weight, [(weight.shape[0], rule)], bias, tile=tile)
        self._inputs, self._outputs = weight.shape[1], weight.shape[0]
        self._number = next(_numbers)
        _products[self._number] = self

    def forward(self, x: Tensor) -> Tensor:
        """Computes the product [..., out] with `x` [..., in] of one token."""
        if x.numel() != self._inputs:
            raise SparsifierError(f"decode kernels take one token of {self._inputs} inputs, not {list(x.shape)}")
        y: Tensor = torch.ops.resting.compiled_columns(x.contiguous(), self._number, self._outputs)
        return y


@torch.library.custom_op("resting::compiled_columns", mutates_args=())
def compiled_columns(x: Tensor, number: int, outputs: int) -> Tensor:
    """Computes the product of the `CompiledColumns` with this number."""
    y = _products[number].product(x)
    assert y is not None
    return y.view(*x.shape[:-1], outputs)


@compiled_columns.register_fake
def _(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def single_columns(weight: Tensor, rule: Rule, bias: Tensor | None, rests: float) -> CompiledColumns | CudaColumns:
    """Prepares the product of a layer in the form that was measured to be faster at a share of inputs at rest.

    Parameters
    ----------
    weight : Tensor [out, in]
        Kept input-major.
    rule : Rule
    bias : Tensor [out], optional
    rests : float
        Share of the inputs that is expected to rest, in [0, 1].

    Raises
    ------
    SparsifierError
        If there is no kernel for the rule in either form.
    """
    outputs, inputs = weight.shape
    reason, tile = missing(weight.device), None
    if reason is None:
        try:
            check_shapes(weight, [outputs], Input())
            found, compiled, triton = fastest((SINGLE, inputs, outputs, True), weight, rests)
            tile, reason = Tile(*found), None if compiled < triton else SLOWER
        except SparsifierError as error:
            reason = str(error)
    FORMS[f"single products, {COMPILED if reason is None else in_triton(reason)}"] += 1
    if reason is None and tile is not None:
        return CompiledColumns(weight, rule, bias, tile)
    return CudaColumns(weight, [(outputs, rule)], bias, rests=rests)
