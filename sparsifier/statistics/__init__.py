"""What methods may know of the dense model: its activations on calibration text, and its weights."""

from sparsifier.statistics.collected import SiteStatistics, Statistic, Statistics
from sparsifier.statistics.histogram import Histogram
from sparsifier.statistics.moments import Moments
from sparsifier.statistics.watching import run_watched

__all__ = ["Histogram", "Moments", "SiteStatistics", "Statistic", "Statistics", "run_watched"]
