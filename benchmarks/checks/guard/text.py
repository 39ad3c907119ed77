"""Measures how far a loss moves when thresholds round differently, by how much text it is measured on.

``python -m resting.benchmarks.checks.guard.text WIKITEXT2`` prints the table of docs/protocol.md, from which
`report.compared.jitter` has its constant too: TEAL at 0.50 on the embedded model. It takes ten minutes on a core.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from resting.baselines.teal import Teal
from resting.benchmarks.assets import models, wikitext2
from resting.benchmarks.cells import suite_file
from resting.benchmarks.checks.guard.jitter import jittered
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.sparsifier import AllButFirst, Plan
from resting.sparsifier.logits import final_hidden, logits

RELATIVE = 2e-4
SEEDS, WINDOWS, LENGTH = 3, 128, 512
TOKENS = (1024, 4096, 16384, 65536)


@torch.no_grad()
def nats(model: Any, plan: Plan, windows: Tensor) -> np.ndarray:
    """Score `windows` under `plan`: nats a token, window by window."""
    found = []
    with plan.applied(model, AllButFirst(1)):
        for ids in windows.split(4):
            for hidden, tokens in zip(final_hidden(model, ids), ids):
                scores = logits(model, hidden[:-1]).float()
                right = scores.gather(-1, tokens[1:, None])[:, 0]
                found.append(float((scores.logsumexp(-1) - right).double().mean()))
    return np.array(found)


def moves(losses: np.ndarray, moved: list[np.ndarray], dense: np.ndarray, count: int) -> tuple[float, float, float]:
    """Compute the moves of the loss over dense, cut into samples of `count` windows.

    Parameters
    ----------
    losses, dense : ndarray [windows]
    moved : list of ndarray [windows]
        The same under jitter, seed by seed.

    Returns
    -------
    (float, float, float)
        Root mean square and largest of the moves in nats a token, and the first as a share of the loss.
    """
    samples = len(losses) // count * count
    by_sample = np.concatenate([(one - losses)[:samples].reshape(-1, count).mean(1) for one in moved])
    typical = float(np.sqrt((by_sample**2).mean()))
    return typical, float(np.abs(by_sample).max()), typical / float((losses - dense).mean())


def main() -> None:
    """Print the table."""
    wikitext2.provide({"wikitext2": sys.argv[1]})
    suite = suite_file.load("baselines")
    loaded = LoadedModel(suite, models.resolve(models.DEFAULT), "cpu", lambda *_: None)
    windows = loaded.windows("wikitext2", "evaluation", LENGTH, WINDOWS).ids
    plan = Teal(0.5).plan_for(loaded.calibrated_for(None))
    losses, dense = (nats(loaded.model, p, windows) for p in (plan, Plan({}, "dense", 0.0, 0.0, plan.model)))
    moved = [nats(loaded.model, jittered(plan, seed, RELATIVE), windows) for seed in range(SEEDS)]
    rows = []
    for tokens in TOKENS:
        typical, largest, share = moves(losses, moved, dense, tokens // LENGTH)
        rows.append([f"{tokens:,}", f"{typical:.5f}", f"{largest:.5f}", f"{100 * share:.2f} %"])
    print(tabulate(rows, ["tokens", "typical move", "largest", "share of the loss"], tablefmt="github"))


if __name__ == "__main__":
    main()
