"""Fits the method of a cell and measures it on every text of the suite."""

from __future__ import annotations

import math
import shutil
import time
from functools import partial
from typing import Any

from resting.benchmarks import cache
from resting.benchmarks.cells.cell import COLUMNS, Cell, Result
from resting.benchmarks.cells.identity import cell_key
from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality import perplexity
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.sparsifier import Plan, PlanError, SparsifierError

REPORTED = ("matched", "losses", "ratios", "rho", "threshold_factors")
"""What of a plan's `info` goes into provenance.json."""

TOLERANCE = 0.01
"""How far from its target a method's measured byte sparsity may be before its rows say so."""


def measure(bench: LoadedModel, cell: Cell, missing: dict[str, str]) -> Result:
    """Run one cell.

    Parameters
    ----------
    bench : LoadedModel
    cell : Cell
    missing : dict of str to str
        Texts and tasks that cannot be had, with the reason; their rows carry it instead of a number.

    Returns
    -------
    Result
    """
    begin = time.monotonic()
    result = Result("done")
    texts, last = bench.suite.evaluation.texts, bench.suite.evaluation.scored
    try:
        plan = fitted(bench, cell)
    except (SparsifierError, AssetError) as error:
        result.status = "missing" if isinstance(error, AssetError) else "skipped"
        unmeasured(bench, cell, result, str(error))
        return result
    for text in texts:
        if text in missing:
            _reason(bench, cell, result, text, missing[text])
            continue
        scored = perplexity.score(
            bench.reference(text),
            plan,
            cell.policy,
            partial(_tick, bench, text),
            last=last,
        )
        _numbers(bench, cell, result, text, scored)
        has_bias = any(rule.bias is not None for rule in plan.rules.values())
        is_first = text == next(t for t in texts if t not in missing)
        if has_bias and is_first and cell.target in bench.suite.evaluation.folded:
            scored = perplexity.score(bench.reference(text), plan, cell.policy, folded=True, last=last)
            _row(bench, cell, result, text, f"{text}_perplexity_folded", scored.perplexity(), scored)
        if has_bias and cell.target in bench.suite.evaluation.on_dense:
            scored = perplexity.score(bench.reference(text), plan.biases_only(), cell.policy, last=last)
            _row(bench, cell, result, text, f"{text}_perplexity_on_dense", scored.perplexity(), scored)
            _row(bench, cell, result, text, f"{text}_kl_on_dense", scored.divergence(), scored)
    for name in bench.suite.task_names:
        if name in missing:
            _no_task(bench, cell, result, name, missing[name])
        else:
            _task(bench, cell, result, plan, name)
    if bench.suite.tasks and bench.suite.tasks.compare and cell.config.name == "dense":
        _other_dtype(bench, cell, result, plan, bench.suite.tasks.compare)
    if plan.rules:
        result.info["nominal"] = plan.nominal
        result.info |= {k: v for k, v in plan.info.items() if k in REPORTED}
        if abs(plan.info.get("matched", cell.target) - cell.target) > TOLERANCE:
            note = f"measured {plan.info['matched']:.4f} on calibration text: no threshold meets the target"
            for row in result.rows:
                row["reason"] = note
    if plan.rules and bench.masked_cost is None:
        bench.masked_cost = result.info["masked_over_dense"] = bench.masked_over_dense(plan, bench.calibrated(cell))
    result.seconds = time.monotonic() - begin
    return result


def unmeasured(bench: LoadedModel, cell: Cell, result: Result, reason: str) -> None:
    """Rows of a cell that has no number: one a metric, with the reason."""
    for text in bench.suite.evaluation.texts:
        _reason(bench, cell, result, text, reason)
    for name in bench.suite.task_names:
        _no_task(bench, cell, result, name, reason)


def _tick(bench: LoadedModel, text: str, done: int, total: int) -> None:
    bench.report(text, done, total, "windows")


def fitted(bench: LoadedModel, cell: Cell) -> Plan:
    """The fitted plan, from the cache where the same method was fitted to the same model on the same text before."""
    folder = cache.root() / "plans" / cell_key(cell, bench.fit_setting)[:32]
    if folder.exists():
        try:
            return Plan.load(folder)
        except PlanError:
            shutil.rmtree(folder)
    plan = bench.calibrated(cell).plan(cell.sparsifier)
    plan.save(folder)
    return plan


def _numbers(bench: LoadedModel, cell: Cell, result: Result, text: str, score: perplexity.Score) -> None:
    _row(bench, cell, result, text, f"{text}_perplexity", score.perplexity(), score)
    _row(bench, cell, result, text, f"{text}_kl", score.divergence(), score)
    result.windows[f"{text}_nll"] = [_rounded(v) for v in score.nll / score.tokens]
    result.windows[f"{text}_kl"] = [_rounded(v) for v in score.kl / score.tokens]


def _task(bench: LoadedModel, cell: Cell, result: Result, plan: Plan, name: str) -> None:
    """Rows of one task: every metric, with the paired difference to dense (of perplexity in nats)."""
    try:
        built = bench.tasks.task(name)
        dense = bench.tasks.dense(name, plan, cell.policy)
        scored = bench.tasks.score(name, plan, cell.policy)
    except (AssetError, SparsifierError) as error:  # no token of these prompts is sparse, say
        _no_task(bench, cell, result, name, str(error))
        result.status = "missing" if isinstance(error, AssetError) else result.status
        return
    for metric, items in scored.items.items():
        _items(bench, cell, result, (name, metric, metric), items, dense.items[metric], scored.byte_sparsity)
    cost = {key: _rounded(value) for key, value in vars(scored.cost).items()}
    about = {"headline": built.headline, "chance": _rounded(built.chance), "available": built.available}
    result.info.setdefault("tasks", {})[name] = about | {"digest": built.digest} | cost


def _other_dtype(bench: LoadedModel, cell: Cell, result: Result, plan: Plan, dtype: str) -> None:
    """The dense model again in `dtype`, as metrics of their own, with the paired difference to the suite's dtype."""
    other = bench.tasks_in(dtype)
    for name in bench.suite.task_names:
        try:
            dense = bench.tasks.dense(name, plan, cell.policy)
        except AssetError:  # said above
            continue
        for metric, items in other.dense(name, plan, cell.policy).items.items():
            _items(bench, cell, result, (name, metric, f"{metric}_{dtype}"), items, dense.items[metric], 0.0)


def _items(
    bench: LoadedModel,
    cell: Cell,
    result: Result,
    names: tuple[str, str, str],
    items: list[float],
    dense: list[float],
    byte_sparsity: float,
) -> None:
    """One row, and its items; `names` are task, metric, and the metric as the row calls it."""
    from resting.benchmarks.quality.tasks import evaluator as tasks

    name, metric, shown = names
    value, deviation = tasks.summary(metric, items)
    gap = tasks.paired(metric, items, dense)
    row = _common(bench, cell, name, f"{name}/{shown}") | {
        "byte_sparsity": _rounded(byte_sparsity),
        "value": _rounded(value),
        "stderr": None if math.isnan(deviation) else _rounded(deviation),
        "n": len(items),
        "window": None,
    }
    ends = {"difference": gap.value, "difference_low": gap.low, "difference_high": gap.high}
    result.rows.append(row | {key: None if math.isnan(v) else _rounded(v) for key, v in ends.items()})
    result.items[f"{name}/{shown}"] = [_rounded(v) for v in items]


def _row(
    bench: LoadedModel,
    cell: Cell,
    result: Result,
    text: str,
    metric: str,
    value: tuple[float, float],
    score: perplexity.Score,
) -> None:
    mean, error = (_rounded(v) for v in value)
    sparsity = _rounded(score.byte_sparsity)
    result.rows.append(
        _common(bench, cell, text, metric)
        | {
            "byte_sparsity": sparsity,
            "value": mean,
            "stderr": None if math.isnan(error) else error,
            "n": score.n,
        }
    )


def _reason(bench: LoadedModel, cell: Cell, result: Result, text: str, reason: str) -> None:
    for metric in ("perplexity", "kl"):
        result.rows.append(_common(bench, cell, text, f"{text}_{metric}") | {"reason": reason})


def _no_task(bench: LoadedModel, cell: Cell, result: Result, name: str, reason: str) -> None:
    result.rows.append(_common(bench, cell, name, f"{name}/acc") | {"reason": reason})


def _common(bench: LoadedModel, cell: Cell, text: str, metric: str) -> dict[str, Any]:
    suite = bench.suite
    values = {
        "suite": suite.name,
        "model": bench.source.name,
        "method": cell.label,
        "target": cell.target,
        "seed": cell.seed,
        "metric": metric,
        "dataset": text,
        "tokens": str(cell.policy),
        "dtype": suite.dtype,
        "window": suite.evaluation.window,
    }
    return {column: values.get(column) for column in COLUMNS}


def _rounded(value: float) -> float:
    return float(f"{value:.7g}")
