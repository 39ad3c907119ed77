"""Measures a plan on text that it was not fitted on."""

from __future__ import annotations

import math
from typing import Any

from resting.benchmarks.fitting.material import Material
from resting.benchmarks.quality.intervals import difference
from resting.benchmarks.quality.perplexity import DenseReference, score
from resting.benchmarks.quality.rows import rounded
from resting.sparsifier import DivergedError, OnProgress, Plan, TokenPolicy, evaluating

BATCH = 4
"""Windows per forward."""


def measured(
    model: Any, plan: Plan, material: Material, tokens: TokenPolicy, on_progress: OnProgress
) -> dict[str, Any]:
    """Measure bytes and loss of `plan` on the held-out windows, with the code that measures suites.

    Returns
    -------
    dict
        ``text``; ``windows`` and ``tokens``, how many were scored; ``byte_sparsity``, measured; ``dense_loss``,
        ``sparse_loss``, their ``difference`` with the ends of its paired 95 % interval (``difference_low``,
        ``difference_high``; None with fewer than three windows), and ``kl`` from the dense model, in nats per token.

    Raises
    ------
    DivergedError
        If a loss is NaN or infinite.
    """
    windows = material.held_out
    reference = DenseReference(model, windows, BATCH, "measure sparse")
    nothing = Plan({}, "dense", 0.0, 0.0, plan.model)
    with evaluating(model):
        for start in range(0, len(windows), BATCH):
            reference.hidden(start)
            on_progress("measure dense", min(start + BATCH, len(windows)), len(windows), "windows")
        dense = score(reference, nothing, tokens)
        sparse = score(reference, plan, tokens, on_progress)
    losses = [float(one.nll.sum()) / one.n for one in (dense, sparse)]
    for name, loss in zip(("the dense model", f"the model under {plan.method}"), losses):
        if not math.isfinite(loss):
            raise DivergedError(f"{name} has a loss of {loss} on {material.held_out_text}")
    by_window = [(one.nll / one.scored_tokens).tolist() for one in (sparse, dense)]
    gap = difference(*by_window)
    ends = [rounded(end) if math.isfinite(end) else None for end in (gap.low, gap.high)]
    return {
        "text": material.held_out_text,
        "windows": len(windows),
        "tokens": sparse.n,
        "byte_sparsity": rounded(sparse.byte_sparsity),
        "dense_loss": rounded(losses[0]),
        "sparse_loss": rounded(losses[1]),
        "difference": rounded(losses[1] - losses[0]),
        "difference_low": ends[0],
        "difference_high": ends[1],
        "kl": rounded(sparse.divergence()[0]),
    }
