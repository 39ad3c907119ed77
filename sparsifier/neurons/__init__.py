"""Lets neurons of gated MLPs rest: rows of gate and up together with columns of down, chosen by any score."""

from resting.sparsifier.neurons import scores as scores
from resting.sparsifier.neurons.mask import SCORES, NeuronMask, Score, Seen, is_kept, register_score

__all__ = ["SCORES", "NeuronMask", "Score", "Seen", "is_kept", "register_score"]
