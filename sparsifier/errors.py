"""Defines what can go wrong; each message is one sentence that names the value and what is allowed."""

from __future__ import annotations


class SparsifierError(ValueError):
    """Is the base of all errors that this project raises on purpose."""


class UnsupportedModelError(SparsifierError):
    """Says that a model, or a part of it, has a form that is not known, or that a method has no site there."""


class PlanError(SparsifierError):
    """Says that a plan cannot be read, or does not belong to the model it is applied to."""


class TargetUnreachableError(SparsifierError):
    """Says that the byte sparsity asked for is above what the method's sites can leave unread."""


class DivergedError(SparsifierError):
    """Says that activations, logits, a statistic or a loss are NaN, infinite or beyond the range of their dtype."""
