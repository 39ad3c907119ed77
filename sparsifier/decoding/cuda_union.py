"""Computes masked products of two to four tokens on a GPU: a row of weights is read once if any of them needs it."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resting.sparsifier.decoding.contract import MOST_TOKENS, cutoff_of
from resting.sparsifier.decoding.cuda_layouts import Shape, weights_of
from resting.sparsifier.decoding.cuda_masked import Masked, masked_columns, one_each
from resting.sparsifier.decoding.cuda_products import NO_NORM
from resting.sparsifier.decoding.remembered import remembered
from resting.sparsifier.decoding.timing import seconds_per_call
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.rule import Rule

LAYOUTS = [Masked(32, 128, 1, 4), Masked(32, 128, 1, 2)]
"""Layouts, as they are tried: larger tiles were slower for every matrix of an 8B model on an H100."""
SMALLEST = Masked(16, 16, 1, 2)
"""Is used in the interpreter."""
RESTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7)
"""Shares of the inputs at rest for all tokens together at which the kernel is compared with the dense product."""
NEVER = 2.0


class Choice(NamedTuple):
    """Says how products of several tokens are computed."""

    launch: Masked
    least: float
    """Share of the inputs, at rest for all tokens together, from which on the kernel beats the dense product; above 1
    where it never does."""


class CudaUnion(nn.Module):
    """Computes ``W (x - shift)_kept + bias`` of two to four tokens, each with its own mask, in one pass over W.

    Parameters
    ----------
    rule : Rule
        With a threshold, and without a low-rank part.
    inputs : int
    dtype : torch.dtype
    device : torch.device

    Raises
    ------
    SparsifierError
        If the rule has no kernel, or a low-rank part.
    """

    def __init__(self, rule: Rule, inputs: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        if rule.low_rank is not None:
            raise SparsifierError("products of several tokens take no low-rank part")
        cutoff, shift = (torch.as_tensor(v).detach() for v in (cutoff_of(rule, dtype), rule.shift))
        self._inputs, self._layouts = inputs, dict[tuple[int, int], Masked]()
        self._cutoff = one_each(cutoff.to(device, torch.float32).expand(1, inputs))
        moved = shift.to(device, dtype).float().expand(inputs).contiguous()  # rounded as the definition rounds it
        self._shift = moved if bool(shift.any()) else None

    def forward(self, x: Tensor, weight: Tensor, start: Tensor | None = None, launch: Masked | None = None) -> Tensor:
        """Computes the products.

        Parameters
        ----------
        x : Tensor [..., in]
            Of two to four tokens.
        weight : Tensor [out, in]
            With the strides of an input-major store, or of a part of one.
        start : float32 Tensor [out], optional
            What is added to every product.
        launch : Masked, optional

        Returns
        -------
        Tensor [..., out]

        Raises
        ------
        SparsifierError
            For another number of tokens, and for weights that are not input-major.
        """
        outputs, tokens = weight.shape[0], x.numel() // self._inputs
        if x.shape[-1] != self._inputs or not 2 <= tokens <= MOST_TOKENS:
            raise SparsifierError(
                f"products of several tokens take 2 to {MOST_TOKENS} of {self._inputs} inputs, not {list(x.shape)}"
            )
        if outputs > 1 and weight.stride(0) != 1:
            raise SparsifierError("column kernels take input-major weights: see `input_major`")
        if launch is None and (outputs, tokens) not in self._layouts:
            self._layouts[outputs, tokens] = choice(weight, tokens).launch
        at = launch or self._layouts[outputs, tokens]
        y: Tensor = torch.ops.resting.masked_columns(
            *(x.contiguous(), weight.detach().t(), self._cutoff, self._shift, start, [outputs, outputs]),
            *(None, None, None, *NO_NORM, 0, None, 1.0, None, tokens, False, list(at), False),
        )[0]
        return y


def choice(weight: Tensor, tokens: int) -> Choice:
    """Measures, once per shape and number of tokens, how a product is laid out and when it is worth it.

    Parameters
    ----------
    weight : Tensor [out, in]
        Of the shape, dtype and device in question.
    tokens : int
    """
    outputs, inputs = weight.shape
    shape = Shape("union", inputs, outputs, weight.dtype, weight.device)
    if weight.device.type != "cuda":  # the interpreter, whose times mean nothing
        return Choice(SMALLEST, NEVER)
    key = f"{shape}, {tokens} tokens"
    if key not in CHOICES:
        what = f"{shape._replace(device=torch.device('cuda'))}, {tokens} tokens"
        launch, least = remembered("union", what, weight.device, lambda: _measured(shape, tokens))
        CHOICES[key] = Choice(Masked(*launch), float(least))
    return CHOICES[key]


CHOICES: dict[str, Choice] = {}
"""Holds what is used from now on, by shape and number of tokens."""


def _measured(shape: Shape, tokens: int) -> Choice:
    weights = weights_of(shape)  # [in, out]
    x = torch.randn(1, 1, shape.inputs, dtype=shape.dtype, device=shape.device).expand(tokens, -1, -1).contiguous()
    dense = min(_linear(x, [w.t() for w in weights], shape), _linear(x, [w.t().contiguous() for w in weights], shape))
    outputs = weights[0].shape[1]

    def time(at: Masked, rests: float) -> float:
        least = x[0, 0].abs().float().quantile(rests).view(1, 1)
        more = least, None, None, [outputs, outputs], None, None, None, *NO_NORM, 0, None, 1.0, None, tokens, False
        calls = [partial(masked_columns, x, w, *more, list(at), False) for w in weights]
        return seconds_per_call(calls, shape.device)

    best = min(LAYOUTS, key=lambda at: time(at, RESTS[len(RESTS) // 2]))
    return Choice(best, least_of([time(best, rests) for rests in RESTS], dense))


def least_of(kernel: list[float], dense: float) -> float:
    """Gives the first of `RESTS` from which on no time of the kernel is above that of the dense product."""
    fits = [all(seconds < dense for seconds in kernel[i:]) for i in range(len(RESTS))]
    return next((rests for rests, fit in zip(RESTS, fits) if fit), NEVER)


def _linear(x: Tensor, weights: list[Tensor], shape: Shape) -> float:
    return seconds_per_call([partial(F.linear, x, w) for w in weights], shape.device)
