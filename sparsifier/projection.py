"""Shows the matrix at a site as [out, in], however its module holds it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


def is_linear(module: nn.Module) -> bool:
    """Tells whether a module computes ``x W^T + b`` with one weight: a linear layer, or the transposed one of GPT-2."""
    return isinstance(module, nn.Linear | Conv1D)


@dataclass(frozen=True, eq=False)
class Projection:
    """Shows one matrix of a module.

    Attributes
    ----------
    module : nn.Module
        A linear layer, or experts in one tensor.
    name : str
        Of the parameter that holds it.
    expert : int, optional
        Which of the experts it belongs to.
    transposed : bool
        Whether the parameter is [in, out].
    """

    module: nn.Module
    name: str = "weight"
    expert: int | None = None
    transposed: bool = False

    @classmethod
    def of(cls, linear: nn.Module) -> Projection:
        """Shows the matrix of a linear layer."""
        return cls(linear, transposed=isinstance(linear, Conv1D))

    @property
    def weight(self) -> Tensor:
        """Gives the matrix [out, in], as a view."""
        whole = getattr(self.module, self.name)
        one = whole if self.expert is None else whole[self.expert]
        return one.t() if self.transposed else one

    @property
    def bias(self) -> Tensor | None:
        """Gives the bias [out], if there is one."""
        if self.expert is None:
            return getattr(self.module, "bias", None)
        whole = getattr(self.module, f"{self.name}_bias", None)
        return None if whole is None else whole[self.expert]

    @property
    def out_features(self) -> int:
        """Counts the outputs."""
        if isinstance(self.module, nn.Linear):
            return self.module.out_features  # whatever the shape of codes is
        return getattr(self.module, self.name).shape[-1 if self.transposed else -2]

    @property
    def in_features(self) -> int:
        """Counts the inputs."""
        if isinstance(self.module, nn.Linear):
            return self.module.in_features
        return getattr(self.module, self.name).shape[-2 if self.transposed else -1]

    @property
    def elements(self) -> int:
        """Counts the numbers in it."""
        return self.out_features * self.in_features
