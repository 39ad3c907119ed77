"""Prepares the rows of ``up`` under a mask of the activated gate, in CUDA C++: a row that rests is not read."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda.arguments import ProductArguments
from resting.sparsifier.decoding.cuda.compiled import function, ready
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.taking import AS_IT_IS, Input
from resting.sparsifier.decoding.cuda.variant import FIXED, STORED, Variant
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Vector

ROWS = 32
"""Rows of a program."""
WIDEST = 16384
"""Inputs that fit into a program's shared memory."""
WARPS, LOADS = 8, 8


class VotingRows:
    """Computes the rows of ``up`` where the activated gate does not rest, times that gate.

    Parameters
    ----------
    weight : Tensor [rows, in]
        Output-major, as linear layers have it.
    cutoff : float or Tensor [rows]
    bias : Tensor [rows], optional
    taken : Input
        Without a gate: as it is, or with a norm.
    gate : Sums, optional
        The gate [rows] before its activation; where None, numbers in the model's dtype, given with every call.
    activation : int
        One of `cuda_norm.ACTIVATIONS`, from 1; 0 for none.
    zeros : Sums, optional
        Are made zeros of on the way; nothing that is read here.

    Raises
    ------
    SparsifierError
        If the kernel does not take these shapes.
    """

    def __init__(
        self,
        weight: Tensor,
        cutoff: Vector,
        bias: Tensor | None = None,
        taken: Input = AS_IT_IS,
        gate: Sums | None = None,
        activation: int = 0,
        zeros: Sums | None = None,
    ) -> None:
        outputs, inputs = weight.shape
        check_rows(weight)
        device = weight.device
        self._weight, self._device, self._outputs = weight.detach(), device, outputs
        self._cutoff = torch.as_tensor(cutoff).detach().to(device, torch.float32).expand(outputs).contiguous()
        self._start = None if bias is None else bias.detach().to(device, torch.float32).contiguous()
        self._gain = None if taken.gain is None else taken.gain.detach().to(device, torch.float32).contiguous()
        self._held = taken, gate, zeros
        self._grid = -(-outputs // ROWS), 1
        self._arguments = a = ProductArguments(
            weight=weight.data_ptr(),
            cutoff=self._cutoff.data_ptr(),
            eps=taken.eps,
            inputs=inputs,
            outputs=outputs,
            stride=inputs // 8,
        )
        if self._start is not None:
            a.start = self._start.data_ptr()
        if self._gain is not None:
            a.gain = self._gain.data_ptr()
        if taken.sums is not None:
            a.x, a.x_unit, a.x_width = taken.sums.words.data_ptr(), taken.sums.unit, taken.sums.width
        if gate is not None:
            a.z, a.z_unit, a.z_width = gate.words.data_ptr(), gate.unit, gate.width
        if zeros is not None:
            a.zero, a.zeros = zeros.words.data_ptr(), zeros.vectors
        self.variant = Variant(
            "rows",
            ctypes.sizeof(ProductArguments),
            half=weight.dtype == torch.float16,
            warps=WARPS,
            loads=LOADS,
            source=STORED if taken.sums is None else FIXED,
            gate_source=STORED if gate is None else FIXED,
            input=taken.kind,
            inputs=inputs,
            activation=activation,
            rounds_first=taken.rounds_first,
            started=bias is not None,
            chained=cuda_overlap.chained(device),
        )
        self._function = function(self.variant, device)
        ready(device)

    def __call__(self, x: Tensor | None = None, gate: Tensor | None = None) -> Tensor:
        """Computes ``gate * (W x + bias)`` [rows] where ``|gate|`` exceeds the cutoff, else 0."""
        a = self._arguments
        if x is not None:
            a.x = x.data_ptr()
        if gate is not None:
            a.z = gate.data_ptr()
        y = torch.empty(self._outputs, dtype=self._weight.dtype, device=self._device)
        a.out = y.data_ptr()
        with cuda_overlap.on(self._device):
            self._function(self._grid, a)
        return y


def check_rows(weight: Tensor) -> None:
    """Refuses shapes that the kernel does not take.

    Raises
    ------
    SparsifierError
    """
    if weight.shape[1] % 16 or weight.shape[1] > WIDEST or not weight.is_contiguous():
        raise SparsifierError(
            f"compiled kernels take rows of a multiple of 16 inputs up to {WIDEST:,}, not of {weight.shape[1]:,}"
        )
