"""Records how a method's authors calibrated and evaluated it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resting.sparsifier.policy import TokenPolicy

Protocol = Literal["common", "nominal", "original"]
"""With ``nominal`` a method has the suite's text and token policy, and its target is the ratio at every site that it
masks, taken from the quantiles of the dense model as papers do; with ``original`` the authors' setting as well."""


@dataclass(frozen=True)
class Original:
    """Describes the setting of a published implementation, applied with ``protocol = "original"``.

    Its target is the ratio at every site the method masks, taken from the quantiles of the dense model and not matched
    by measurement: the share of *intermediate neurons* for CATS and CHESS, of inputs for TEAL, of each layer's
    budget for R-Sparse.

    Attributes
    ----------
    windows, window : int
        Calibration windows, and their length in tokens.
    tokens : TokenPolicy
        Sparse tokens of a scored sequence.
    text : str
        What the authors calibrate on.
    source : str
        Names where this is known from.
    """

    windows: int
    window: int
    tokens: TokenPolicy
    text: str
    source: str
