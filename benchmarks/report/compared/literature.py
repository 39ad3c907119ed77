"""Puts published figures beside measured ones: at the paper's thresholds, and at equal bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from resting.benchmarks.cells import literature
from resting.benchmarks.cells.literature import Figure, PublishedTable
from resting.benchmarks.labels import innermost
from resting.benchmarks.names import short
from resting.benchmarks.report.table import Part, Table, shown_target

Measured = Callable[[str, Figure], tuple[float, float] | None]
"""From a method's label and a figure to its measured value, and the measured share of bytes at rest."""


def is_counterpart(measured: str, published: str) -> bool:
    """Say whether a measured model goes by the name of a published one, with or without the organisation."""
    return _bare(measured) == _bare(published)


def _bare(name: str) -> str:
    return short(name).rsplit("/", 1)[-1].lower()


def at_thresholds(method: str) -> str:
    """Name the row of `method` at the paper's thresholds: ``spon(teal)`` becomes ``spon(teal, nominal)``."""
    name, comma, label = method.partition(",")
    if name == "dense":
        return method
    inner = innermost(name)
    return re.sub(rf"(?<![\w-]){re.escape(inner)}(?![\w-])", f"{inner}, nominal", name, count=1) + comma + label


def sections(names: Sequence[str], models: Sequence[str], measured: dict[str, Measured]) -> list[Part]:
    """Make one table for every published table in `names`.

    Parameters
    ----------
    names : sequence of str
        Of tables in published.toml.
    models : sequence of str
        Models that the suite names: their figures are listed, or those of the measured models alone where there are.
    measured : dict of str to callable
        By measured model what gives its values.
    """
    parts: list[Part] = []
    for name in names:
        table = literature.tables()[name]
        rows = _rows(table, models, measured)
        if not rows:
            continue
        heads = ["model", "method", "sparsity"]
        heads += [f"published ({literature.TRUST[table.trust]})", "measured at the paper's thresholds", "bytes at rest"]
        heads += ["measured at equal bytes"]
        parts += [f"### {table.title}", Table(table.title, f"{table.about} Source: {table.source}.", heads, rows)]
    if not parts:
        return []
    about = (
        "What others published stands in a column of its own, with how far it can be trusted. The paper's sparsity is "
        "the ratio at every layer, from quantiles of the dense model: rows at its thresholds have that ratio, and say "
        "how many bytes rest as measured; rows at equal bytes rest that share of the bytes."
    )
    return ["## Published figures beside measured ones", about, *parts]


def _rows(table: PublishedTable, models: Sequence[str], measured: dict[str, Measured]) -> list[list[str]]:
    of_measured = [f for f in table.figures if any(is_counterpart(model, f.model) for model in measured)]
    figures = of_measured or [f for f in table.figures if any(is_counterpart(model, f.model) for model in models)]
    rows = []
    for figure in figures:
        values = [get for model, get in measured.items() if is_counterpart(model, figure.model)]
        nominal, equal = (_first(values, label, figure) for label in (at_thresholds(figure.method), figure.method))
        line = [figure.model, figure.method, shown_target(figure.sparsity), f"{figure.value:g}"]
        line += ["not measured", ""] if nominal is None else [f"{nominal[0]:.4g}", f"{nominal[1]:.3f}"]
        rows.append([*line, "not measured" if equal is None else f"{equal[0]:.4g}"])
    return rows


def _first(values: list[Measured], label: str, figure: Figure) -> tuple[float, float] | None:
    return next((found for get in values if (found := get(label, figure)) is not None), None)
