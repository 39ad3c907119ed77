"""Gathers the statistics of what a method compares with its thresholds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.mask_functions import THRESHOLD
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import Statistics


def scored(method: Any, calibrated: CalibratedModel) -> Statistics:
    """Gathers what `method` needs, and histograms of its scores where these are not |x|.

    A score is ``scale * |x - centre|``, and with a mask function what that makes of it. `method` is a `Sparsifier`.
    """
    known, sites = calibrated.statistics(method.needs), calibrated.decoder.sites(method.roles)
    scales, centres = _given(method.scale, sites, known), _given(method.centre, sites, known)
    if method.mask != THRESHOLD or centres:  # |x| is not what is compared anywhere
        scales = dict.fromkeys(sites, torch.ones(())) | scales
    return calibrated.scored(method.needs, scales, centres, method.mask)


def _given(
    of: Callable[[Site, Statistics], Tensor | None], sites: Iterable[Site], known: Statistics
) -> dict[Site, Tensor]:
    return {site: value for site in sites if (value := of(site, known)) is not None}
