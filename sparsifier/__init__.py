"""The one interface that every input sparsifier of this project is written against.

A :class:`Sparsifier` looks at calibration statistics and decides, site by site, which inputs of a linear layer
may rest; what it decided is a :class:`Plan`, which a context manager puts into a model and takes out again.
Nothing in this package knows a particular method or a benchmark.
"""

from resting.sparsifier.base import Compensated, Sparsifier
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.calibration import Calibration
from resting.sparsifier.errors import (
    NonFiniteError,
    PlanError,
    SparsifierError,
    TargetUnreachableError,
    UnsupportedModelError,
)
from resting.sparsifier.meter import Meter
from resting.sparsifier.original import Original
from resting.sparsifier.plan import Plan
from resting.sparsifier.policy import AllButFirst, DecodeOnly, LastFraction, TokenPolicy, is_by_position
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import ACT, LINEAR_ROLES, Decoder, Site
from resting.sparsifier.statistics import Histogram, Moments, SiteStatistics, Statistic, Statistics

__all__ = [
    "ACT",
    "LINEAR_ROLES",
    "AllButFirst",
    "CalibratedModel",
    "Calibration",
    "Compensated",
    "DecodeOnly",
    "Decoder",
    "Histogram",
    "LastFraction",
    "Meter",
    "Moments",
    "NonFiniteError",
    "Original",
    "Plan",
    "PlanError",
    "Rule",
    "Site",
    "SiteStatistics",
    "Sparsifier",
    "SparsifierError",
    "Statistic",
    "Statistics",
    "TargetUnreachableError",
    "TokenPolicy",
    "UnsupportedModelError",
    "is_by_position",
]
