"""Rewrites a model exactly: norms folded into the matrices that read them, and rotations merged into weights.

A :class:`Transform` says what is rewritten, and is saved with a plan. `explicit` runs it with the residual stream as it
was, for quality; `merged` rotates the residual stream itself, for decoding.
"""

from resting.sparsifier.transform.bases import (
    eigenbasis,
    head_bases,
    random_rotation,
    right_singular_basis,
    sum_of_moments,
)
from resting.sparsifier.transform.explicit import active, dense_bias, explicit
from resting.sparsifier.transform.merged import merged, merged_rules
from resting.sparsifier.transform.transform import Transform

__all__ = [
    "Transform",
    "active",
    "dense_bias",
    "eigenbasis",
    "explicit",
    "head_bases",
    "merged",
    "merged_rules",
    "random_rotation",
    "right_singular_basis",
    "sum_of_moments",
]
