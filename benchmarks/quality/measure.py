"""Measures one cell: fits its method, scores the suite's texts, and asks its tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from resting.benchmarks.cells.cell import Cell, Result
from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality import perplexity
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.plans import fitted
from resting.benchmarks.quality.rows import Rows, rounded
from resting.benchmarks.quality.tasks.metrics import paired, summary
from resting.sparsifier import Compensated, DivergedError, Plan, PlanError, SparsifierError

REPORTED = ("matched", "losses", "ratios", "rho", "threshold_factors", "experts_with_few_tokens")
"""Keys of a plan's `info` that go into provenance.json."""
TOLERANCE = 0.01
"""Distance from its target of a method's measured byte sparsity from which on its rows say so."""


def measure(loaded: LoadedModel, cell: Cell, missing: Mapping[str, str]) -> Result:
    """Measure one cell.

    Parameters
    ----------
    loaded : LoadedModel
    cell : Cell
    missing : mapping of str to str
        Texts and tasks that cannot be had, with the reason; their rows carry it instead of a number.

    Returns
    -------
    Result
    """
    begin = time.monotonic()
    rows = Rows(loaded.suite, loaded.source.name, cell)
    info = dict[str, Any](begins_with=loaded.begins_with)
    if isinstance(cell.sparsifier, Compensated):
        loaded.make_room()
    try:
        plan = fitted(loaded, cell)
    except (SparsifierError, AssetError) as error:
        rows.nothing(_reason(error))
        return Result(_status(error), rows.rows, seconds=time.monotonic() - begin)
    status = _score_texts(loaded, cell, plan, rows, missing)
    for name in loaded.suite.task_names:
        if name in missing:
            rows.no_task(name, missing[name])
            continue
        try:
            about = _ask(loaded, cell, plan, rows, name)
            info.setdefault("tasks", {})[name] = about
        except (AssetError, SparsifierError) as error:  # no token of these prompts is sparse, say
            rows.no_task(name, _reason(error))
            status = status if _status(error) == "skipped" else _status(error)
    if loaded.suite.tasks and loaded.suite.tasks.compare and cell.config.name == "dense":
        _ask_in(loaded, cell, plan, rows, loaded.suite.tasks.compare)
    if cell.config.name == "dense":
        info["reads"] = _reads(loaded)
    if not plan.is_dense:
        info |= {"nominal": plan.nominal} | {k: v for k, v in plan.info.items() if k in REPORTED}
        if abs(plan.info.get("matched", cell.target) - cell.target) > TOLERANCE:
            asked = getattr(cell.sparsifier, "match", True)  # SPON at the thresholds of another does not ask for it
            why = ": no threshold meets the target" if asked else ""
            rows.note(f"measured {plan.info['matched']:.4f} on calibration text{why}")
    return Result(status, rows.rows, rows.windows, rows.items, time.monotonic() - begin, info)


def _reads(loaded: LoadedModel) -> dict[str, Any]:
    """What a token reads of the blocks' matrices, all that they hold, the share that methods can let rest.

    Beside them stands what the output layer holds, which every token reads.
    """
    decoder = loaded.calibrated_for(None).decoder
    stored = sum(decoder.projection(site).elements for site in decoder.matrices)
    stored += sum(sum(found.dense.values()) for found in decoder.found)
    reads = {"elements": round(decoder.elements), "stored": stored, "can_rest": rounded(decoder.covered)}
    head = loaded.model.get_output_embeddings()
    return reads if head is None else reads | {"output": head.weight.numel()}


def _status(error: AssetError | SparsifierError) -> str:
    """Tell what lacks from what cannot be, and both from what is not finite."""
    return "missing" if isinstance(error, AssetError) else "diverged" if isinstance(error, DivergedError) else "skipped"


def _reason(error: AssetError | SparsifierError) -> str:
    return f"diverged: {error}" if isinstance(error, DivergedError) else str(error)


def _score_texts(loaded: LoadedModel, cell: Cell, plan: Plan, rows: Rows, missing: Mapping[str, str]) -> str:
    """Score every text that can be had, and return the cell's status.

    Plans with biases are scored folded and on the dense model as well, where it is asked for.
    """
    status = "done"
    evaluation = loaded.suite.evaluation
    has_bias = any(rule.bias is not None for rule in plan.rules.values())
    available = [text for text in evaluation.texts if text not in missing]
    for text in evaluation.texts:
        if text in missing:
            rows.no_text(text, missing[text])
            continue
        try:
            score = partial(perplexity.score, loaded.reference(text), policy=cell.policy, last=evaluation.scored)
            found = score(plan, on_progress=loaded.on_progress)
        except SparsifierError as error:  # diverged, or a method that needs what this policy has not: a prompt, say
            rows.no_text(text, _reason(error))
            status = _status(error)
            continue
        rows.score(text, found)
        if has_bias and text == available[0] and cell.target in evaluation.folded:
            try:
                folded = score(plan, folded=True)
            except PlanError as error:  # with a shift or weights of its own: the number is not defined
                rows.no_number(text, f"{text}_perplexity_folded", str(error))
            else:
                rows.number(text, f"{text}_perplexity_folded", folded.perplexity(), folded)
        if has_bias and cell.target in evaluation.on_dense:
            alone = score(plan.biases_only())
            rows.number(text, f"{text}_perplexity_on_dense", alone.perplexity(), alone)
            rows.number(text, f"{text}_kl_on_dense", alone.divergence(), alone)
    return status


def _ask(loaded: LoadedModel, cell: Cell, plan: Plan, rows: Rows, name: str) -> dict[str, Any]:
    """Add the rows of one task, with paired differences to dense, and return what provenance says of it."""
    built = loaded.tasks.task(name)
    dense = loaded.tasks.dense(name, plan, cell.policy)
    scored = loaded.tasks.score(name, plan, cell.policy)
    for metric, items in scored.items.items():
        gap = paired(metric, items, dense.items[metric])
        rows.task(name, metric, items, summary(metric, items), gap, scored.byte_sparsity)
    cost = {key: rounded(value) for key, value in vars(scored.cost).items()}
    about = {"headline": built.headline, "chance": rounded(built.chance), "available": built.available}
    return about | {"digest": built.digest} | cost


def _ask_in(loaded: LoadedModel, cell: Cell, plan: Plan, rows: Rows, dtype: str) -> None:
    """Ask the dense model again in `dtype`: metrics of their own, with the difference to the suite's dtype."""
    other = loaded.tasks_in(dtype)
    for name in loaded.suite.task_names:
        try:
            dense = loaded.tasks.dense(name, plan, cell.policy)
        except (AssetError, DivergedError):  # said above
            continue
        try:
            there = other.dense(name, plan, cell.policy)
        except DivergedError as error:
            rows.no_task(name, f"in {dtype} {_reason(error)}")
            continue
        for metric, items in there.items.items():
            gap = paired(metric, items, dense.items[metric])
            rows.task(name, f"{metric}_{dtype}", items, summary(metric, items), gap, 0.0)
