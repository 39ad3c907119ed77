"""A plan at decode: kernels that do not read what rests. They give no quality figure, so no cell's hash holds them."""

from resting.sparsifier.decoding.decoder import decoding

__all__ = ["decoding"]
