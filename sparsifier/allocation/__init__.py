"""From a model-wide byte target to a ratio for each site: uniform, greedy by block, evolutionary, and measured."""

from sparsifier.allocation.evolution import Evolution
from sparsifier.allocation.greedy import BlockGreedy
from sparsifier.allocation.matching import match
from sparsifier.allocation.uniform import coverage, uniform

__all__ = ["BlockGreedy", "Evolution", "coverage", "match", "uniform"]
