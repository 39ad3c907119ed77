"""Products of one token on a GPU, prepared once for a layer or for layers that read the same input."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn

from sparsifier.errors import SparsifierError
from sparsifier.kernels.columns import cutoff_of
from sparsifier.kernels.cuda import Launch
from sparsifier.kernels.launches import columns_launch, rows_launch
from sparsifier.rule import Rule, Vector


class CudaColumns(nn.Module):
    """``W (x - shift)_kept + U V (x - x_kept) + bias`` with weights kept input-major; several layers in one launch.

    Parameters
    ----------
    weight : Tensor [out, in]
        With the strides of an input-major store, or of a part of one; of several layers, one after another.
    layers : list of (int, Rule)
        Number of outputs and rule of each. One that is not alone has no low-rank part, and all but the last have a
        multiple of a tile's outputs.
    bias : Tensor [out], optional
    launch : Launch, optional
        The fastest for this shape where None.

    Raises
    ------
    SparsifierError
        If layers with these rules cannot share a launch.
    """

    def __init__(
        self, weight: Tensor, layers: list[tuple[int, Rule]], bias: Tensor | None = None, launch: Launch | None = None
    ) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        device, rules = weight.device, [rule for _, rule in layers]
        widths = [width for width, _ in layers]
        if not 1 <= len(rules) <= 3:
            raise SparsifierError(f"one to three layers share a launch, not {len(rules)}")
        if len(rules) > 1 and any(rule.low_rank is not None for rule in rules):
            raise SparsifierError("a layer with a low-rank part takes a launch of its own")
        self.launch = launch or columns_launch(inputs, outputs, weight.dtype, device, tuple(widths[:-1]))
        if outputs > 1 and weight.stride(0) != 1:
            raise SparsifierError("column kernels take input-major weights: see `input_major`")
        if any(width % self.launch.outputs for width in widths[:-1]):
            raise SparsifierError(f"layers of {widths} outputs do not share tiles of {self.launch.outputs}")
        self._inputs = inputs
        self._weight = weight.detach().t()
        self._cutoff = torch.stack([_vector(cutoff_of(r, weight.dtype), inputs, device) for r in rules])
        shifted = any(bool(torch.as_tensor(r.shift).any()) for r in rules)
        shifts = [_vector(torch.as_tensor(r.shift).to(weight.dtype), inputs, device) for r in rules]
        self._shift = torch.stack(shifts) if shifted else None
        self._start = None if bias is None else _vector(bias, outputs, device)
        self._begins = [*accumulate(widths[:-1]), outputs, outputs][:2]
        self._counter = torch.zeros(-(-outputs // self.launch.outputs), dtype=torch.int32, device=device)
        self._u = self._v = None
        if rules[0].low_rank is not None:
            u, v = (factor.detach().to(weight).t().contiguous() for factor in rules[0].low_rank)
            self._u, self._v = u, v
            self._thin = columns_launch(inputs, v.shape[1], weight.dtype, device)
            thin_tiles = -(-v.shape[1] // self._thin.outputs)
            self._thin_counter = torch.zeros(thin_tiles, dtype=torch.int32, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Product [..., out] with `x` [..., in] of one token."""
        if x.numel() != self._inputs:
            raise SparsifierError(f"decode kernels take one token of {self._inputs} inputs, not {list(x.shape)}")
        x, z = x.contiguous(), None
        if self._v is not None:
            one = [self._v.shape[1]] * 2
            z = torch.ops.resting.columns(
                *(x, self._v, self._cutoff, None, None, one),
                *(None, None, self._thin_counter, True, list(self._thin), True),
            )
        at = list(self.launch)
        y: Tensor = torch.ops.resting.columns(
            *(x, self._weight, self._cutoff, self._shift, self._start, self._begins),
            *(z, self._u, self._counter, False, at, False),
        )
        return y


class CudaRows(nn.Module):
    """Rows of ``up`` where the activated gate does not rest, times that gate.

    Parameters
    ----------
    weight : Tensor [rows, in]
        Output-major, as linear layers have it.
    cutoff : float or Tensor [rows]
    bias : Tensor [rows], optional
    launch : Launch, optional
    """

    def __init__(
        self, weight: Tensor, cutoff: Vector, bias: Tensor | None = None, launch: Launch | None = None
    ) -> None:
        super().__init__()
        outputs, self._inputs = weight.shape
        self.launch = launch or rows_launch(self._inputs, outputs, weight.dtype, weight.device)
        self._weight = weight.detach().contiguous()
        self._cutoff = _vector(cutoff, outputs, weight.device)
        self._start = None if bias is None else _vector(bias, outputs, weight.device)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        """``gate * (W x + bias)`` where ``|gate|`` is above the cutoff, else 0; `gate` [..., rows] of one token."""
        if x.numel() != self._inputs:
            raise SparsifierError(f"decode kernels take one token of {self._inputs} inputs, not {list(x.shape)}")
        at = list(self.launch)
        y: Tensor = torch.ops.resting.gated_rows(
            x.contiguous(), self._weight, gate.contiguous(), self._cutoff, self._start, at
        )
        return y


def _vector(value: Vector, width: int, device: torch.device) -> Tensor:
    return torch.as_tensor(value).detach().to(device, torch.float32).expand(width).contiguous()
