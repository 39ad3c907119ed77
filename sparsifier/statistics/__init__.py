"""Gathers what methods may know of the dense model: its activations on calibration text, and its weights."""

from resting.sparsifier.statistics.channel_moments import ChannelMoments
from resting.sparsifier.statistics.collected import SiteStatistics, Statistic, Statistics
from resting.sparsifier.statistics.gram import Gram
from resting.sparsifier.statistics.histogram import Histogram
from resting.sparsifier.statistics.moments import Moments
from resting.sparsifier.statistics.watching import run_watched

__all__ = [
    "ChannelMoments",
    "Gram",
    "Histogram",
    "Moments",
    "SiteStatistics",
    "Statistic",
    "Statistics",
    "run_watched",
]
