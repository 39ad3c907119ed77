"""Holds the codes and scales of one matrix, as the kernels read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.quantised.formats import Format


@dataclass(frozen=True)
class QuantisedWeight:
    """Holds one matrix in a `Format`; codes are not packed.

    Attributes
    ----------
    format : Format
    codes : Tensor of int8 [inputs, outputs]
        From ``format.lowest`` to ``format.highest``.
    scales : Tensor of float16 or bfloat16 [inputs, outputs / group]
    zeros : Tensor of int8 [inputs, outputs / group] or None
        Codes that stand for 0, where ``format.zero``.
    """

    format: Format
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None

    def __post_init__(self) -> None:
        inputs, outputs = self.codes.shape
        groups = groups_of(outputs, self.format)
        assert self.codes.dtype == torch.int8
        assert self.scales.dtype in (torch.float16, torch.bfloat16)
        assert self.scales.shape == (inputs, groups)
        assert (self.zeros is not None) == self.format.zero
        assert self.zeros is None or (self.zeros.dtype == torch.int8 and self.zeros.shape == (inputs, groups))

    @property
    def inputs(self) -> int:
        """Counts the inputs."""
        return self.codes.shape[0]

    @property
    def outputs(self) -> int:
        """Counts the outputs."""
        return self.codes.shape[1]

    @property
    def bits(self) -> int:
        """Counts what is stored: codes, scales and zero points, in bits."""
        groups = self.scales.numel()
        zeros = groups * self.format.bits if self.zeros is not None else 0
        return self.codes.numel() * self.format.bits + 16 * groups + zeros

    def dequantised(self) -> Tensor:
        """Gives the numbers that kernels compute with: ``(code - zero) * scale``.

        Returns
        -------
        Tensor of float32 [inputs, outputs]
            No product is rounded: a code has at most 8 bits, a scale 11.
        """
        codes = self.codes.float().view(self.inputs, -1, self.format.group)
        if self.zeros is not None:
            codes = codes - self.zeros.float()[:, :, None]
        return (codes * self.scales.float()[:, :, None]).view(self.inputs, self.outputs)


def groups_of(outputs: int, format: Format) -> int:
    """Counts the groups of one input.

    Raises
    ------
    SparsifierError
        If a group does not divide the outputs.
    """
    if outputs % format.group:
        raise SparsifierError(
            f"{format.name} has a scale for every {format.group} outputs, which does not divide a matrix of {outputs} "
            "outputs; allowed: a group that does"
        )
    return outputs // format.group
