"""Compares methods and weight formats by the time of a token: losses of one suite, times of another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.names import RANDOM, of_weights, short, slug, without_format
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report.compared import weights
from resting.benchmarks.report.compared.weights import Compared
from resting.benchmarks.report.plots import bits, draw
from resting.benchmarks.report.plots.bits import Point
from resting.benchmarks.report.speedups import timed_in
from resting.benchmarks.report.table import Part
from resting.sparsifier.quantised.formats import AS_IS, Format

SHARES = (1.0, 0.9, 0.8, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
"""Of the dense time of weights as they are: budgets of time."""
Times = dict[tuple[str, str, float], float]
"""Milliseconds of a token by format, method and target."""


@dataclass(frozen=True)
class Timed:
    """Holds the times of one model in one dtype on one number of threads.

    Attributes
    ----------
    model, dtype : str
        The model as it is.
    threads : int
    weights : dict of str to str
        What rows call its weights, by format.
    times : Times
    dense : float
        Milliseconds of its fastest dense path with weights as they are.
    """

    model: str
    dtype: str
    threads: int
    weights: dict[str, str]
    times: Times
    dense: float


def of_times(decoded: pd.DataFrame, facts: Mapping[str, Any], folder: Path) -> list[Part]:
    """Write the section of a folder of times, against the losses of the suite that it names beside it.

    Nothing where either of them has one format, or where nothing was measured in both.
    """
    source = facts["suite"]["latency"].get("quality")
    if not source or not (folder.parent / source / "results.csv").exists():
        return []
    found = _losses(folder.parent / source)
    return _sections(found, decoded, facts, folder, f"losses are those of the suite `{source}`", "")


def of_quality(found: Sequence[Compared], facts: Mapping[str, Any], folder: Path) -> list[Part]:
    """Write a section for every folder of times beside `folder` that names its suite."""
    parts: list[Part] = []
    for file in sorted(folder.parent.glob("*/decode.csv")) if found else []:
        try:
            of = folders.read_facts(file.parent)
            named = (of["suite"].get("latency") or {}).get("quality") == facts["suite"]["name"]
            decoded = folders.read_table(file, may_be_empty=True) if named else pd.DataFrame()
        except (BenchmarkError, KeyError, TypeError, AttributeError):  # its own report says what is wrong with it
            continue
        if not decoded.empty:
            said = f"times are those of `{file.parent.name}`"
            parts += _sections(found, decoded, of, folder, said, f"{slug(file.parent.name)}-")
    return parts


def _losses(folder: Path) -> list[Compared]:
    facts, frame = folders.read_facts(folder), folders.read_results(folder)
    if facts.keys() != folders.FACTS or not (folder / "windows.parquet").exists():
        return []
    windows, main = folders.read_singles(folder / "windows.parquet"), frame.tokens.iloc[0]
    return weights.compared(frame[frame.tokens == main], windows[windows.tokens == main], facts)


def _sections(
    found: Sequence[Compared], decoded: pd.DataFrame, facts: Mapping[str, Any], folder: Path, said: str, prefix: str
) -> list[Part]:
    parts: list[Part] = []
    groups = timed(decoded)
    for one in groups if found else []:
        for of in found:
            points, of_codes = joined(of, one)
            if len({p.format for p in points}) < 2:
                continue
            where = timed_in(one.dtype, one.threads, facts["measured_on"])
            more = f"{slug(short(one.model))}-{one.dtype}-{one.threads}-" if len(groups) > 1 or len(found) > 1 else ""
            parts += _of_model(points, of, one, where, folder, said, f"{prefix}{more}time", of_codes)
            break
    return parts


def timed(decoded: pd.DataFrame) -> list[Timed]:
    """Find the time of a token of every model, format, method and target in the rows of decode.csv.

    Every time was taken in turn with the dense path of weights as they are, and is given as its share of that, times
    the median of all of that path's: the machine may have been slower in one part of a run than in another.
    """
    if "speedup" not in decoded or "weights" not in decoded:
        return []
    done = decoded[decoded.speedup.notna()].copy()
    form = done.weight_format if "weight_format" in done else pd.Series(np.nan, index=done.index)
    done["form"] = form.where(form.notna(), AS_IS)
    done["base"] = [without_format(model, of) for model, of in zip(done.model, done.form)]
    groups = []
    for (base, dtype, threads), of in done.groupby(["base", "dtype", "threads"], sort=False):
        dense = 1e3 * float(of.dense_p20.median())
        times: Times = {(AS_IS, "dense", 0.0): dense}
        for name, rows in of.groupby("form", sort=False):
            own = [_own_dense(row) / row.dense_p20 for row in rows.itertuples()]
            if name != AS_IS and np.isfinite(own).all():
                times[str(name), "dense", 0.0] = dense * float(np.median(own))
            for row in rows.itertuples():
                times[str(name), row.method, float(row.target)] = dense * row.sparse_p20 / row.dense_p20
        named = {str(name): str(rows.weights.iloc[0]) for name, rows in of.groupby("form", sort=False)}
        groups.append(Timed(str(base), str(dtype), int(threads), named, times, dense))
    return groups


def _own_dense(row: Any) -> float:
    """Seconds of a token from codes with nothing at rest; of older rows, known where it beats the dense path."""
    own = getattr(row, "own_dense_p20", np.nan)
    if np.isfinite(own):
        return float(own)
    ratio = getattr(row, "speedup_all", np.nan)
    return float(ratio * row.sparse_p20) if ratio < row.speedup else np.nan


def joined(of: Compared, one: Timed) -> tuple[list[Point], bool]:
    """Give every loss its time; also tell whether codes that make up for errors took the time of the nearest.

    A time of other weights than those of a loss is given to none, unless it is of random ones.
    """
    points, of_codes = [], False
    for point in of.points:
        form = Format.parse(point.format)
        name = AS_IS if form is None else form.stored.name
        if name not in one.weights or not _is_of(of, name, one.weights[name]):
            continue
        found = one.times.get((name, point.method, 0.0 if point.method == "dense" else point.target))
        if found is not None:
            points.append(replace(point, cost=found))
            of_codes = of_codes or name != point.format
    return points, of_codes


def _is_of(of: Compared, form: str, known: str) -> bool:
    """Tell whether the weights that rows call `known` are those of a model in a format, or random ones."""
    return known == RANDOM or (form in of.hashes and of_weights(of.hashes[form]) == known)


def _of_model(
    points: Sequence[Point],
    of: Compared,
    one: Timed,
    where: str,
    folder: Path,
    said: str,
    name: str,
    of_codes: bool,
) -> list[Part]:
    title = f"Loss against time, {short(one.model)}, {where}"
    about = (
        f"The same losses as against bits read, against the measured time of a token; {said}. A time is its share of "
        f"the fastest dense path with weights as they are ({one.dense:.2f} ms, median), which was timed in turn with "
        "it, times that median. Dense in a format is the codes with nothing at rest; as is, that path."
    )
    if of_codes:
        about += (
            " How codes were found does not change how they are read: `-gptq` has the time of the nearest codes under "
            "the same method and target."
        )
    if RANDOM in one.weights.values():
        about += (
            f" **Weights of {one.model} are random, and have a time and no quality**: the losses are those of "
            f"{of.model} in the same format, under the same method and target."
        )
    label = f"ms a token ({where})" + (f"\nof {short(one.model)}" if RANDOM in one.weights.values() else "")
    picture = draw.write(bits.chart(points, f"{of.model}: loss against time", label), folder, name)
    caption = (
        "The smallest loss under a budget of time, by weight format and with nothing at rest, with the method and its "
        f"target. {weights.MARKED}"
    )
    shares = {f"{share * one.dense:.2f} ms ({share:.2f})": share * one.dense * (1 + 1e-9) for share in SHARES}
    return [
        f"## {title}",
        about + weights.was_short(of.model),
        f"![Nats a token above dense against the time of a token]({picture})",
        weights.budgets(points, of.lost, title, caption, shares),
        weights.front_table(points, title, "The Pareto front: nothing is faster at no more loss", "ms"),
    ]
