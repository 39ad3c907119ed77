"""The one interface that every input sparsifier of this project is written against.

A :class:`Sparsifier` looks at calibration statistics and decides, site by site, which inputs of a linear layer
may rest; what it decided is a :class:`Plan`, which a context manager puts into a model and takes out again.
Nothing in this package knows a particular method or a benchmark.
"""

from sparsifier.accounting import Meter
from sparsifier.calibration import Calibration
from sparsifier.errors import (
    NonFiniteError,
    PlanError,
    SparsifierError,
    TargetUnreachableError,
    UnsupportedModelError,
)
from sparsifier.fitting import Fitting
from sparsifier.plan import Plan
from sparsifier.policy import AllButFirst, DecodeOnly, LastFraction, TokenPolicy, is_by_position
from sparsifier.protocol import Original
from sparsifier.rule import Rule
from sparsifier.sites import ACT, LINEAR_ROLES, Decoder, Site
from sparsifier.sparsifier import Compensated, Sparsifier
from sparsifier.statistics import Histogram, Moments, SiteStatistics, Statistic, Statistics

__all__ = [
    "ACT",
    "LINEAR_ROLES",
    "AllButFirst",
    "Calibration",
    "Compensated",
    "DecodeOnly",
    "Decoder",
    "Fitting",
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
