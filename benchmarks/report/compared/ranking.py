"""Ranks all methods at one target: what each loses, and whether that tells it from the best and from its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from resting.benchmarks.cells.ranking import Unranked, unranked
from resting.benchmarks.quality.intervals import Interval
from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report.compared import jitter, seeds
from resting.benchmarks.report.table import Part, Table, shown_target


@dataclass(frozen=True)
class Ranked:
    """Holds one line of a ranking.

    Attributes
    ----------
    method : str
    rank : int or None
        From 1; None where the method is compared with no other.
    bytes : float
        Measured share of bytes at rest, mean over texts and seeds.
    losses : dict of str to float
        Nats a token above dense, by text.
    loss : Interval
        Their mean over texts.
    from_best, from_reference : Interval or None
        Paired difference to the best method and to the reference; positive where this one loses more. None for itself.
    apart : bool or None
        Whether the paired difference to the next better method excludes zero; None for the first.
    unranked : str
        Why it has no rank.
    """

    method: str
    rank: int | None
    bytes: float
    losses: Mapping[str, float]
    loss: Interval
    from_best: Interval | None
    from_reference: Interval | None
    apart: bool | None
    unranked: str = ""


def ranked(
    frame: pd.DataFrame, windows: pd.DataFrame, texts: list[str], target: float, reference: str | None, out: Unranked
) -> list[Ranked]:
    """Rank the methods at `target` by their mean loss over `texts`, those without a rank last.

    Parameters
    ----------
    frame : DataFrame
        Rows of results.csv, of one model and token policy.
    windows : DataFrame
        The single values behind them.
    reference : str or None
        The method that all are held against beside the best.
    out : mapping
        Methods that are not ranked, with the reason (`cells.ranking.unranked`).
    """
    every = analysis.lost(windows, texts)
    lost = {method: values for (method, at), values in every.items() if at == target and len(values) == len(texts)}
    lost = {method: values for method, values in lost.items() if all(np.isfinite(v).all() for v in values)}
    means = {method: float(np.mean([v.mean() for v in values])) for method, values in lost.items()}
    order = sorted((m for m in lost if (m, target) not in out), key=lambda method: means[method])
    last = sorted((m for m in lost if (m, target) in out), key=lambda method: means[method])
    base = lost.get(reference) if reference is not None else None
    lines = []
    for place, method in enumerate([*order, *last]):
        values = lost[method]
        is_ranked = place < len(order)
        better = lost[order[place - 1]] if is_ranked and place else None
        lines.append(
            Ranked(
                method,
                place + 1 if is_ranked else None,
                _bytes(frame, method, target),
                {text: float(v.mean()) for text, v in zip(texts, values)},
                seeds.mean(values),
                seeds.difference(values, lost[order[0]]) if order and method != order[0] else None,
                seeds.difference(values, base) if base is not None and method != reference else None,
                None if better is None else not seeds.difference(values, better).holds_zero,
                out.get((method, target), ""),
            )
        )
    return lines


def _bytes(frame: pd.DataFrame, method: str, target: float) -> float:
    of = frame[(frame.method == method) & (frame.target == target) & frame.metric.str.endswith("_perplexity")]
    return float(of.byte_sparsity.mean())


def sections(
    frame: pd.DataFrame, windows: pd.DataFrame, texts: list[str], reference: str | None, title: str = "Ranking"
) -> list[Part]:
    """Make one table a target, and say below it of every method without a number why it has none.

    Parameters
    ----------
    frame, windows, texts, reference
        As `ranked`.
    title : str
        Of the section.
    """
    out = unranked(frame[frame.dataset.isin(texts)])
    of_texts = frame[frame.metric.isin([f"{text}_perplexity" for text in texts])]
    scored = int(of_texts.groupby("dataset").n.max().sum())
    parts: list[Part] = [f"## {title}", _about(reference, scored)]
    for target in sorted(t for t in frame.target.unique() if t > 0):
        lines = ranked(frame, windows, texts, target, reference, out)
        if not lines:
            continue
        heads = ["rank", "method", "bytes at rest", *texts, "mean", "more than the best"]
        heads += [f"against {reference}"] if reference is not None else []
        rows = [_row(line, texts, reference is not None) for line in lines]
        parts.append(f"### {title} at {shown_target(target)}")
        parts.append(Table(f"{title} at {shown_target(target)}", "", [*heads, "told from the one before"], rows))
        parts += _without(frame, target, {line.method for line in lines})
    return parts if len(parts) > 2 else []


def _about(reference: str | None, scored: int) -> str:
    held = f" and from {reference}" if reference is not None else ""
    moved = jitter.explained_share(scored) if scored else 0.0
    rounding = f" On so much text rounding alone moves a loss by up to {moved:.1%} of it." if moved else ""
    return (
        "Nats a token above dense at equal measured bytes, by text and in the mean over texts; the measured share of "
        f"bytes at rest; and the paired differences from the best{held}, with 95 % intervals over the same windows. "
        "A method is told from the one before it where the interval of their paired difference excludes zero."
        f"{rounding}"
    )


def _row(line: Ranked, texts: list[str], has_reference: bool) -> list[str]:
    rank = f"- ({line.unranked})" if line.rank is None else str(line.rank)
    told = "" if line.apart is None or line.rank is None else "yes" if line.apart else "no"
    return [
        rank,
        f"**{line.method}**" if line.rank == 1 else line.method,
        f"{line.bytes:.4f}",
        *(f"{line.losses[text]:.3f}" for text in texts),
        _interval(line.loss, sign=False),
        _interval(line.from_best),
        *([_interval(line.from_reference)] if has_reference else []),
        told,
    ]


def _interval(found: Interval | None, sign: bool = True) -> str:
    if found is None:
        return ""
    plus = "+" if sign else ""
    ends = "" if np.isnan(found.low) else f" [{found.low:{plus}.3f}, {found.high:{plus}.3f}]"
    return f"{found.value:{plus}.3f}{ends}"


def _without(frame: pd.DataFrame, target: float, shown: set[str]) -> list[Part]:
    """List the methods that have no number at `target`, with their reasons."""
    lacking = frame[(frame.target == target) & frame.value.isna() & ~frame.method.isin(shown)]
    reasons = lacking.groupby("method", sort=False).reason.first().fillna("no reason kept")
    if reasons.empty:
        return []
    listed = "\n".join(f"- {method}: {reason}" for method, reason in reasons.items())
    return [f"Without a number at {shown_target(target)}:\n\n{listed}"]
