"""Decodes under a plan by kernels that do not read what rests; no quality figure and no cell's hash depends on them."""

from resting.sparsifier.decoding.decoder import decoding

__all__ = ["decoding"]
