"""What can go wrong, each as one sentence that names the value and what is allowed."""

from __future__ import annotations


class SparsifierError(ValueError):
    """Base of all errors that this project raises on purpose."""


class UnsupportedModelError(SparsifierError):
    """The model has no blocks with separate q, k, v, o, gate, up and down linear layers."""


class PlanError(SparsifierError):
    """A plan cannot be read, or does not belong to the model it is applied to."""


class TargetUnreachableError(SparsifierError):
    """The byte sparsity asked for is above what the method's sites can leave unread."""


class NonFiniteError(SparsifierError):
    """A statistic or a loss became NaN or infinite."""
