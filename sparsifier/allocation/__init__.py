"""Turns a model-wide byte target into ratios of sites: uniform, along depth, greedy, evolutionary, and measured."""

from resting.sparsifier.allocation.evolution import Evolution
from resting.sparsifier.allocation.greedy import BlockGreedy, GreedySearch
from resting.sparsifier.allocation.matching import match
from resting.sparsifier.allocation.slope import in_blocks, slope
from resting.sparsifier.allocation.uniform import coverage, uniform

__all__ = ["BlockGreedy", "Evolution", "GreedySearch", "coverage", "in_blocks", "match", "slope", "uniform"]
