"""Compares methods and weight formats by the bits that a token reads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.names import slug, without_format
from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report.compared import seeds
from resting.benchmarks.report.plots import bits, draw
from resting.benchmarks.report.plots.bits import Point
from resting.benchmarks.report.style import BROKEN
from resting.benchmarks.report.table import Part, Table, shown_target
from resting.sparsifier.meter import PLAIN_BITS
from resting.sparsifier.quantised.formats import AS_IS, Format

BUDGETS = (16.0, 12.0, 10.0, 8.5, 8.0, 7.0, 6.0, 5.0, 4.5, 4.0, 3.5, 3.0, 2.5, 2.0, 1.5, 1.0)
"""Bits a token, over the weights of the blocks, under which the best is looked for."""
MARKED = "**Bold**: the smallest of its line; ≈: within noise of it (paired)."
Lost = dict[tuple[str, str, float], list[np.ndarray]]
"""Nats above dense by format, method and target: for every text [seeds, windows]."""


@dataclass(frozen=True)
class Compared:
    """Holds one model in all of its weight formats.

    Attributes
    ----------
    model : str
        As it is.
    hashes : dict of str to str
        Of its weights in a format (sha256), by format.
    points : list of Point
        Their costs are bits read a token.
    lost : Lost
    """

    model: str
    hashes: dict[str, str]
    points: list[Point]
    lost: Lost


def compared(frame: pd.DataFrame, windows: pd.DataFrame, facts: Mapping[str, Any]) -> list[Compared]:
    """Find what every model of a suite loses in every format; nothing where it has one format.

    Parameters
    ----------
    frame, windows : DataFrame
        Rows of results.csv and windows.parquet, of the suite's own token policy.
    facts : mapping
        What provenance.json holds.
    """
    stored = {model["name"]: model.get("stored_as", AS_IS) for model in facts["models"]}
    if len(set(stored.values())) < 2:
        return []
    hashes = {model["name"]: model["sha256"] for model in facts["models"]}
    texts = [t for t in facts["suite"]["evaluation"]["texts"] if (frame.metric == f"{t}_perplexity").any()]
    found = []
    for model in dict.fromkeys(without_format(name, form) for name, form in stored.items()):
        names = {form: name for name, form in stored.items() if without_format(name, form) == model}
        if AS_IS not in names or not texts:
            continue
        lost = _lost(windows, names, texts)
        points = _with_head(_points(lost, frame, names, texts), names[AS_IS], facts)
        if len(points) > 1:
            found.append(Compared(model, {form: hashes[name] for form, name in names.items()}, points, lost))
    return found


def sections(found: Sequence[Compared], folder: Path) -> list[Part]:
    """Compare the weight formats of models by the bits that a token reads; pictures are drawn into `folder`."""
    parts: list[Part] = []
    for one in found:
        prefix = f"{slug(one.model)}-" if len(found) > 1 else ""
        parts += _of_model(one, len(found) > 1, folder, prefix)
    return parts


def was_short(model: str) -> str:
    """Say of weights that were in few bits before they came here what that does; nothing of others."""
    if not (kind := re.search(r"\((Q\d[^,)]*)", model)):
        return ""
    return (
        f" **These weights were in few bits before they came here ({kind[1]})**: their row as is carries that loss "
        "already, so that 4 bits look freer than they are on weights in full precision."
    )


def _of_model(one: Compared, is_named: bool, folder: Path, prefix: str) -> list[Part]:
    points, lost, model = one.points, one.lost, one.model
    title = f"Bits read, {model}" if is_named else "Bits read"
    stays, over = "embedding and output layer stay as they are", "the weights of the blocks' matrices"
    if with_head := stores_head(points):
        stays = "the embedding stays as it is, and so does the output layer, but for formats with `-head`"
        over += " and of the output layer"
    said = (
        f"Block linears in every weight format; {stays}. Losses are nats a token "
        "above the dense model with its weights as they are, mean over the texts. Bits are what a token reads, over "
        f"{over}: scales and zero points count, so does what a method adds, in 16 bits, "
        "and a weight as it is counts 16. A target is the share of the weights that rest, whatever they are stored in. "
        "Quality is that of the codes that a kernel reads, dequantised; KL and the tables below are against the dense "
        "model in the same format."
    )
    said += was_short(model)
    label = bits.BITS + (" and the output layer" if with_head else "")
    name = draw.write(bits.chart(points, f"{model}: loss against bits read a token", label), folder, f"{prefix}bits")
    return [
        f"## {title}",
        said,
        f"![Nats a token above dense against bits read a token]({name})",
        _budgets(points, lost, title),
        front_table(points, title, "The Pareto front: nothing reads fewer bits at no more loss", "bits read"),
        *(_table(points, form, title) for form in dict.fromkeys(p.format for p in points)),
    ]


def _lost(windows: pd.DataFrame, names: Mapping[str, str], texts: list[str]) -> Lost:
    """Losses against the dense model as it is, window by window."""
    dense = windows[(windows.model == names[AS_IS]) & (windows.method == "dense")]
    found: Lost = {}
    for form, name in names.items():
        mine = windows[windows.model == name]
        mine = mine.assign(method=mine.method.where(mine.method != "dense", form))
        by_key = analysis.lost(pd.concat([dense, mine]), texts)
        for (method, target), values in by_key.items():
            if len(values) == len(texts):
                found[form, "dense" if method == form else method, target] = values
    return found


def _points(lost: Lost, frame: pd.DataFrame, names: Mapping[str, str], texts: list[str]) -> list[Point]:
    rows = frame[frame.metric.isin([f"{text}_perplexity" for text in texts]) & frame.value.notna()]
    read = rows.groupby(["model", "method", "target"]).bits_read.mean()
    points = []
    for (form, method, target), values in lost.items():
        key = names[form], method, target
        loss = float(np.mean([v.mean() for v in values]))
        if key in read.index and np.isfinite(read[key]) and np.isfinite(loss):
            points.append(Point(form, method, target, float(read[key]), loss, *seeds.interval(values)))
    return points


def stores_head(points: Sequence[Point]) -> bool:
    """Tell whether the output layer is stored in one of the formats too."""
    return any((form := Format.parse(p.format)) is not None and form.head for p in points)


def _with_head(points: list[Point], model: str, facts: Mapping[str, Any]) -> list[Point]:
    """Count the output layer among the weights where one of the formats stores it: 16 bits of it in the others."""
    if not stores_head(points):
        return points
    reads = next(cell["reads"] for cell in facts["cells"] if cell["model"] == model and "reads" in cell)
    blocks, head = reads["elements"], reads["output"]

    def bits_of(form: Format | None) -> float:
        return PLAIN_BITS if form is None or not form.head else form.bits_a_weight

    return [
        replace(p, cost=(p.cost * blocks + bits_of(Format.parse(p.format)) * head) / (blocks + head)) for p in points
    ]


def _budgets(points: Sequence[Point], lost: Lost, title: str) -> Table:
    caption = (
        "The smallest loss under a budget of bits read a token, by weight format and with nothing at rest (fewer bits "
        f"alone), with the method and its target. {MARKED}"
    )
    return budgets(points, lost, title, caption, {f"{budget:g}": budget for budget in BUDGETS})


def budgets(points: Sequence[Point], lost: Lost, title: str, caption: str, under_which: Mapping[str, float]) -> Table:
    """Say for every budget, by how it is shown, what each format loses at best, and what fewer bits alone do."""
    formats = list(dict.fromkeys(p.format for p in points))
    lines = []
    for shown, budget in under_which.items():
        under = [p for p in points if p.cost <= budget]
        if not under:
            break
        best = min(under, key=lambda p: p.loss)
        if best.loss > BROKEN:
            break
        line = [shown]
        for among in (
            *([p for p in under if p.format == f] for f in formats),
            [p for p in under if p.method == "dense"],
        ):
            line.append(_best_of(among, best, lost))
        lines.append(line)
    return Table(title, caption, ["at most", *formats, "nothing at rest"], lines)


def _best_of(points: Sequence[Point], best: Point, lost: Lost) -> str:
    if not points:
        return ""
    mine = min(points, key=lambda p: p.loss)
    what = mine.method if mine.method == "dense" else f"{mine.method} {shown_target(mine.target)}"
    what = f"{mine.format}" if mine.method == "dense" else what
    if mine == best:
        return f"**{mine.loss:.3f}** {what}"
    keys = [(p.format, p.method, p.target) for p in (mine, best)]
    gap = seeds.difference(lost[keys[0]], lost[keys[1]])
    return f"{mine.loss:.3f} {what}{' ≈' if gap.low <= 0.0 <= gap.high else ''}"  # of too few windows nothing is known


def front_table(points: Sequence[Point], title: str, caption: str, cost: str) -> Table:
    """List the Pareto front, from what costs most to the cheapest."""
    lines = [
        [f"{p.cost:.2f}", p.format, p.method, shown_target(p.target), _interval(p)]
        for p in reversed(bits.front([p for p in points if p.loss <= BROKEN]))
    ]
    caption = f"{caption} (measured; intervals are not looked at)."
    return Table(title, caption, [cost, "weights", "method", "target", "loss"], lines)


def _table(points: Sequence[Point], form: str, title: str) -> Table:
    mine = [p for p in points if p.format == form]
    targets = sorted({p.target for p in mine if p.method != "dense"})
    at = {(p.method, p.target): p for p in mine}
    lines = []
    for method in dict.fromkeys(p.method for p in mine):
        wanted = [0.0 if method == "dense" else t for t in targets] or [0.0]
        lines.append([method, *(_cell(at.get((method, t))) for t in wanted)])
    dense = at.get(("dense", 0.0))
    caption = f"**{form}**" + ("" if dense is None else f", {dense.cost:g} bits a weight with what is not quantised")
    return Table(title, f"{caption}: loss, and in brackets the bits read.", ["", *map(shown_target, targets)], lines)


def _cell(point: Point | None) -> str:
    return "" if point is None else f"{point.loss:.3f} ({point.cost:.2f})"


def _interval(point: Point) -> str:
    if np.isnan(point.low):
        return f"{point.loss:.3f} {analysis.NO_INTERVAL}"
    return f"{point.loss:.3f} [{point.low:.3f}, {point.high:.3f}]"
