"""Measures SPON's training speed, over a plain forward and backward of the same model."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.report.table import markdown
from resting.benchmarks.studies.study import Study, write
from resting.method.spontaneous import Spontaneous
from resting.method.training import frozen
from resting.sparsifier import OnProgress
from resting.sparsifier.logits import final_hidden, logits

ROUNDS, STEPS = 3, 4


def measure(loaded: LoadedModel, cells: list[Cell]) -> pd.DataFrame:
    """Measure tokens per second of training and of plain passes, taken in turn, by method and round.

    Training counts whole steps, with the teacher's pass, masks, meter and optimiser. Plain is forward, cross-entropy
    and backward on the same number of tokens; with gradients of all weights, and of none (frozen, as SPON has them).
    """
    rows: list[dict[str, Any]] = []
    for cell in cells:
        if not isinstance(cell.sparsifier, Spontaneous) or any(row["method"] == cell.label for row in rows):
            continue  # one target of a method tells its speed
        method = replace(cell.sparsifier, steps=STEPS, match_every=STEPS, match=False)
        calibrated = copy.copy(loaded.calibrated(cell))
        calibrated.folder = None  # no checkpoint to go on from
        method.inner.plan_for(calibrated)
        tokens = STEPS * method.batch * method.window
        for number in range(ROUNDS + 1):
            seeded = replace(method, seed=1000 + number)  # other sequences, so that the teacher runs too
            timings = {
                "spon": _seconds(seeded.fit_calibrated, calibrated),
                "plain": _seconds(_plain, loaded.model, method, nullcontext()),
                "frozen": _seconds(_plain, loaded.model, method, frozen(loaded.model)),
            }
            if number:  # the first round warms up
                rates = {name: tokens / seconds for name, seconds in timings.items()}
                rows.append({"method": cell.label, "round": number} | rates)
        loaded.model.zero_grad(set_to_none=True)
    if not rows:
        raise SuiteError("the study of training speed needs a suite with spon(...) in it")
    return pd.DataFrame(rows)


def _plain(model: Any, method: Spontaneous, weights: AbstractContextManager[Any]) -> None:
    size = min(1000, model.get_input_embeddings().num_embeddings)
    ids = torch.randint(10, size, (method.batch, method.window), device=next(model.parameters()).device)
    with weights, torch.enable_grad():
        for _ in range(STEPS):
            # Frozen, the embeddings are what the backward pass goes to.
            embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
            hidden = model.base_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
            z = logits(model, hidden[:, :-1]).float().flatten(0, 1)
            F.cross_entropy(z, ids[:, 1:].flatten()).backward()
            model.zero_grad(set_to_none=True)


def _seconds(run: Callable[..., Any], *args: Any) -> float:
    begin = time.perf_counter()
    run(*args)
    return time.perf_counter() - begin


def run(study: Study, on_progress: OnProgress) -> Path:
    """Measure, and write a table into ``OUTPUT/SUITE-speed``."""
    loaded = study.loaded(on_progress)
    final_hidden(loaded.model, torch.zeros(1, 8, dtype=torch.long, device=loaded.device))
    frame = measure(loaded, study.cells())
    lines = []
    for method, of in frame.groupby("method", sort=False):
        ratios = [statistics.median(of.spon / of[name]) for name in ("plain", "frozen")]
        rates = [statistics.median(of[name]) for name in ("spon", "plain", "frozen")]
        lines.append([str(method), *(f"{rate:.0f}" for rate in rates), *(f"{ratio:.2f}" for ratio in ratios)])
    about = (
        "Tokens a second of training (whole steps: the dense model's pass, masks, meter, optimiser), and of a forward "
        "and backward pass of the dense model on as many tokens, with gradients of all weights and of none; taken in "
        f"turn in one process, median of {ROUNDS} rounds. Ratios are of the same round."
    )
    headers = ["method", "training", "plain", "plain, weights frozen", "over plain", "over frozen"]
    return write(study, "speed", "Training speed", [about, markdown(lines, headers)], frame)
