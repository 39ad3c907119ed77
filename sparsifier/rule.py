"""Defines the rule of a site: which of its inputs rest, and what stands in for them."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import lru_cache
from numbers import Integral
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier.errors import PlanError
from resting.sparsifier.mask_functions import THRESHOLD, mask_function

Vector = Tensor | float
_MASK = attrgetter("threshold", "scale", "shift", "topk", "mask", "rescale")


@dataclass(frozen=True)
class Rule:
    r"""Describes the input mask of one linear layer, and its compensation.

    .. math::
        keep = |scale \cdot (x - shift)| > threshold, \qquad
        y = W' ((x - shift) \odot keep) + U V x + bias, \qquad W' = W - U V

    or, with `topk`, the channels of the so many largest ``|scale (x - shift)|`` of each token are kept, or those that
    the function called `mask` keeps. With `weight`, sparse tokens have that in the place of W. Every method is
    a choice of these fields; the defaults are neutral. At `ACT` the mask acts on the activated gate, and only
    `threshold`, `scale`, `topk` and `mask` have a meaning.

    Attributes
    ----------
    threshold : float or Tensor [in]
        At least 0. At 0 only exact zeros rest, at infinity everything does.
    scale : float or Tensor [in]
        Finite, at least 0; TEAL 1, CHESS E|up|, WINA the column norms of W.
    shift : float or Tensor [in]
        Subtracted before the mask, not added back (a method that wants it back puts ``W @ shift`` into `bias`).
    bias : Tensor [out], optional
        Added to the output of sparse tokens.
    low_rank : (Tensor [out, r], Tensor [r, in]), optional
        U and V. `W` itself is left as it is: the masked form adds ``U V (x - x_kept)``, which is the same.
    topk : int, optional
        Channels kept of every token, instead of those above a threshold: the density is exact, at the price of a
        selection before the weights can be read.
    mask : str
        The name of a mask function (`mask_functions`), whose parameter `threshold` then is, one number: ``"top-p"``
        keeps the largest scores of a token until they hold a share p of its L1 norm, ``"max-p"`` those of at least p
        times the largest, and ``"statistical"`` those above m + c sigma of the token's scores. What they keep
        is known only when all of the input is there.
    rescale : bool
        Multiply the kept input u_kept of every token by ``sqrt(Var u / Var u_kept)``, with u = x - shift. Both are
        variances over all channels of the token, each about its own mean and divided by `in`: in u_kept resting
        channels count as zeros. Where one of them is 0 nothing is multiplied.
    weight : Tensor [out, in], optional
        The weights of sparse tokens, in place of W; dense tokens keep W. Not with `low_rank`.
    """

    threshold: Vector = 0.0
    scale: Vector = 1.0
    shift: Vector = 0.0
    bias: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None
    topk: int | None = None
    mask: str = THRESHOLD
    rescale: bool = False
    weight: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("threshold", "scale", "shift"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or not value.dim():  # one number is a float, whatever it came as
                object.__setattr__(self, name, float(value))
        if self.topk is not None:
            whole = isinstance(self.topk, Integral)
            if not whole or self.topk < 0 or torch.as_tensor(self.threshold).any():
                got = f"{self.topk} and {self.threshold}"
                raise PlanError(f"topk must be at least 0, whole and without a threshold, got {got}")
            object.__setattr__(self, "topk", int(self.topk))
        self._check_mask()
        if self.low_rank is not None:
            u, v = self.low_rank
            if u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0]:
                raise PlanError(f"low_rank must be [out, rank] and [rank, in], got {list(u.shape)} and {list(v.shape)}")
        if self.weight is not None and (self.weight.dim() != 2 or self.low_rank is not None):
            got = f"{list(self.weight.shape)}{' and a low_rank' if self.low_rank is not None else ''}"
            raise PlanError(f"weight must be [out, in] and without a low_rank, got {got}")
        for name in ("scale", "threshold")[: 1 + (self.mask == THRESHOLD)]:
            value = torch.as_tensor(getattr(self, name))
            if value.dim() > 1 or bool((value < 0).any()) or bool(value.isnan().any()):
                raise PlanError(f"{name} must be a number or a vector of numbers of at least 0, got {value}")
        if torch.as_tensor(self.shift).dim() > 1 or (self.bias is not None and self.bias.dim() != 1):
            raise PlanError("shift must be a number or a vector, and bias a vector")
        finite = {"scale": self.scale, "shift": self.shift, "bias": self.bias, "weight": self.weight}
        for name, value in (finite | dict(zip("UV", self.low_rank or ()))).items():
            if value is None or (isinstance(value, Tensor) and value.is_meta):  # shapes without numbers
                continue
            if not bool(torch.isfinite(torch.as_tensor(value)).all()):
                raise PlanError(f"{name} must be finite, got NaN or infinity")

    def _check_mask(self) -> None:
        if self.rescale not in (True, False):
            raise PlanError(f"rescale must be True or False, got {self.rescale!r}")
        object.__setattr__(self, "rescale", bool(self.rescale))
        function = mask_function(self.mask)
        if self.mask == THRESHOLD:
            return
        if self.topk is not None or isinstance(self.threshold, Tensor):
            got = f"topk {self.topk}" if self.topk is not None else "one a channel"
            raise PlanError(f"mask {self.mask!r} takes one number as its threshold and no topk, got {got}")
        function.check(self.threshold)

    def with_topk(self, count: int) -> Rule:
        """Gives the rule that keeps the `count` largest scores of every token instead."""
        return replace(self, threshold=0.0, mask=THRESHOLD, topk=count)

    def same_mask(self, other: Rule) -> bool:
        """Tells whether `other` keeps the same of every input, whatever else it has."""
        return all(mine is its or _same(mine, its) for mine, its in zip(_MASK(self), _MASK(other)))

    @property
    def masks_nothing(self) -> bool:
        """Tells whether every input passes as it is (an exact zero that rests changes nothing)."""
        if self.topk is not None:
            return False
        above = self.threshold if self.mask == THRESHOLD else self.threshold != mask_function(self.mask).neutral
        if _any(above) or self.shifts:
            return False
        return bool((self.scale > 0).all()) if isinstance(self.scale, Tensor) else bool(np.float32(self.scale) > 0)

    @property
    def shifts(self) -> bool:
        """Tells whether something is taken from the input before it is masked."""
        return _any(self.shift)

    def cutoff(self, dtype: torch.dtype) -> Vector:
        """Gives the threshold on |x - shift|, rounded down to `dtype`.

        No value of `dtype` lies between the exact threshold and the rounded one, so that comparing in `dtype` is
        comparing in full precision.

        Returns
        -------
        float or Tensor [in]

        Raises
        ------
        PlanError
            If the channels that are kept depend on the token's other channels: there is no such threshold then.
        """
        if self.mask != THRESHOLD or self.topk is not None:
            raise PlanError(f"a rule with {self._mask_name} has no threshold that is known before the token")
        if isinstance(self.threshold, Tensor) or isinstance(self.scale, Tensor):
            return _cutoff(self.threshold, self.scale, dtype)
        return _known_cutoff(float(self.threshold), float(self.scale), dtype)

    @property
    def _mask_name(self) -> str:
        return f"mask {self.mask!r}" if self.topk is None else "topk"

    def extra_elements(self) -> int:
        """Counts the numbers that a decode step reads beside the weights: the bias and the low-rank factors.

        A `weight` is read in the place of W, not beside it. Thresholds, scales and shifts of channels are not counted:
        at all seven sites they are 0.14 % of a block of the default model (576 wide), and the wider the model the less.
        """
        factors = self.low_rank or ()
        return (0 if self.bias is None else self.bias.numel()) + sum(f.numel() for f in factors)

    def tensors(self) -> dict[str, Tensor]:
        """Gives the fields as named tensors in their own dtypes, without the neutral ones."""
        default = Rule()
        out: dict[str, Tensor] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "low_rank":
                out.update({} if value is None else {"U": value[0], "V": value[1]})
            elif field.name == "topk":
                out.update({} if value is None else {"topk": torch.tensor(value)})
            elif isinstance(value, str):
                out.update({} if value == THRESHOLD else {field.name: torch.tensor(list(value.encode())).byte()})
            elif isinstance(value, Tensor):
                out[field.name] = value
            elif value != getattr(default, field.name):
                out[field.name] = torch.tensor(value, dtype=torch.float64)
        return {k: v.detach().cpu().contiguous() for k, v in out.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> Rule:
        """Makes a rule of what `tensors` gave."""
        values: dict[str, object] = {
            k: v if v.dim() else float(v) for k, v in tensors.items() if k not in ("U", "V", "topk", "mask", "rescale")
        }
        if "U" in tensors:
            values["low_rank"] = (tensors["U"], tensors["V"])
        if "topk" in tensors:
            values["topk"] = int(tensors["topk"])
        if "mask" in tensors:
            values["mask"] = bytes(tensors["mask"].tolist()).decode(errors="replace")
        if "rescale" in tensors:
            values["rescale"] = bool(tensors["rescale"])
        return cls(**values)  # type: ignore[arg-type]


def _cutoff(threshold: Vector, scale: Vector, dtype: torch.dtype) -> Vector:
    scale = torch.as_tensor(scale, dtype=torch.float32)
    exact = torch.as_tensor(threshold, dtype=torch.float32)
    # A channel of scale 0 has score 0: it never exceeds the threshold.
    exact = torch.where(scale > 0, exact / scale, torch.inf) if scale.dim() or scale != 1 else exact
    rounded = exact.to(dtype)
    rounded = torch.where(rounded.float() > exact, _below(rounded), rounded)
    return rounded if rounded.dim() else float(rounded)


_known_cutoff = lru_cache(maxsize=2**14)(_cutoff)
"""Of single numbers: a plan has hundreds, and is put on many times."""


def _any(value: Vector) -> bool:
    """Tells whether a number, or an entry of a vector, is not zero."""
    return bool(value.any()) if isinstance(value, Tensor) else bool(value)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return torch.equal(a, b)
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b


def _below(x: Tensor) -> Tensor:
    return torch.nextafter(x, torch.zeros_like(x))
