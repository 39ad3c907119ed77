"""Defines the one interface that every input sparsifier of this project is written against.

A :class:`Sparsifier` looks at calibration statistics and decides, site by site, which inputs of a linear layer
may rest; what it decided is a :class:`Plan`, which a context manager puts into a model and takes out again.
Nothing in this package knows a particular method or a benchmark.
"""

from resting.sparsifier.allocation import (
    BlockGreedy,
    Evolution,
    GreedySearch,
    coverage,
    in_blocks,
    match,
    slope,
    uniform,
)
from resting.sparsifier.base import Sparsifier
from resting.sparsifier.block_stream import BlockStream, progressively, stages
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.calibration import Calibration
from resting.sparsifier.compensated import Compensated, check_own_weights, folded_bias
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import (
    DivergedError,
    PlanError,
    SparsifierError,
    TargetUnreachableError,
    UnsupportedModelError,
)
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.files import replacing
from resting.sparsifier.layers import SparseLinear, SparseProduct
from resting.sparsifier.logits import check_logits, final_hidden, logits, mean_nll
from resting.sparsifier.mask_functions import THRESHOLD, MaskFunction, mask_function, register
from resting.sparsifier.masking import kept_input, masked
from resting.sparsifier.meter import Meter
from resting.sparsifier.neurons import NeuronMask, Score, Seen, register_score
from resting.sparsifier.neurons.gathered import (
    NeuronStatistics,
    NeuronTokens,
    down_norms,
    neuron_statistics,
    neuron_tokens,
    up_scores,
)
from resting.sparsifier.neurons.method import NeuronSparsifier
from resting.sparsifier.original import Original
from resting.sparsifier.plan import Plan
from resting.sparsifier.policy import AllButFirst, DecodeOnly, LastFraction, TokenPolicy, is_by_position
from resting.sparsifier.progress import OnProgress, silent
from resting.sparsifier.roles import ACT, LINEAR_ROLES, NEURONS, is_wanted
from resting.sparsifier.rule import Rule, Vector
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import (
    ChannelMoments,
    Gram,
    Histogram,
    Moments,
    SiteStatistics,
    Statistic,
    Statistics,
    run_watched,
)
from resting.sparsifier.token_tracker import TokenTracker
from resting.sparsifier.transform import Transform, eigenbasis, random_rotation, right_singular_basis, sum_of_moments
from resting.sparsifier.transformed import FOLDED, Rotated, Transformed, folded_moments, on_folded

__all__ = [
    "ACT",
    "FOLDED",
    "LINEAR_ROLES",
    "NEURONS",
    "THRESHOLD",
    "AllButFirst",
    "BlockGreedy",
    "BlockStream",
    "CalibratedModel",
    "Calibration",
    "ChannelMoments",
    "Compensated",
    "DecodeOnly",
    "Decoder",
    "DivergedError",
    "Evolution",
    "Gram",
    "GreedySearch",
    "Histogram",
    "LastFraction",
    "MaskFunction",
    "Meter",
    "Moments",
    "NeuronMask",
    "NeuronSparsifier",
    "NeuronStatistics",
    "NeuronTokens",
    "OnProgress",
    "Original",
    "Plan",
    "PlanError",
    "Rotated",
    "Rule",
    "Score",
    "Seen",
    "Site",
    "SiteStatistics",
    "SparseLinear",
    "SparseProduct",
    "Sparsifier",
    "SparsifierError",
    "Statistic",
    "Statistics",
    "TargetUnreachableError",
    "TokenPolicy",
    "TokenTracker",
    "Transform",
    "Transformed",
    "UnsupportedModelError",
    "Vector",
    "check_logits",
    "check_own_weights",
    "coverage",
    "down_norms",
    "eigenbasis",
    "evaluating",
    "final_hidden",
    "folded_bias",
    "folded_moments",
    "in_blocks",
    "is_by_position",
    "is_wanted",
    "kept_input",
    "logits",
    "mask_function",
    "masked",
    "match",
    "mean_nll",
    "neuron_statistics",
    "neuron_tokens",
    "on_folded",
    "progressively",
    "random_rotation",
    "register",
    "register_score",
    "replacing",
    "right_singular_basis",
    "run_watched",
    "silent",
    "slope",
    "stages",
    "sum_of_moments",
    "uniform",
    "up_scores",
]
