"""Makes the tables of a quality suite."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.cells import ranking
from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report.compared import jitter
from resting.benchmarks.report.table import Part, Table, shown_target
from resting.sparsifier import Site

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "act", "down")


def values(frame: pd.DataFrame, metric: str, title: str, caption: str) -> Table:
    """Make the table of one metric: a line for every method, a column for every target."""
    all_rows = frame[frame.metric == metric]
    rows = all_rows[all_rows.value.notna()]
    targets = sorted(t for t in rows.target.unique() if t > 0)
    table = []
    for method in rows.method.unique():
        of = rows[rows.method == method]
        line: list[str] = [method]
        for target in [0.0] if method == "dense" else targets:
            at = of[of.target == target]
            all_at = all_rows[(all_rows.method == method) & (all_rows.target == target)]
            lacking = f" ({len(all_at) - len(at)} of {len(all_at)} seeds without)" if 0 < len(at) < len(all_at) else ""
            line.append(_cell(at) + lacking)
        if method == "dense":
            line = [method, *[line[1]] * max(1, len(targets))]
        table.append(line)
    heads = [shown_target(t) for t in targets] or [""]  # a dense model alone has no target
    return Table(title, caption, ["", *heads], table)


def _cell(rows: pd.DataFrame) -> str:
    if rows.empty:
        return ""
    value = rows.value.mean()
    # Seeds are scored on the same windows, whose error therefore remains in the mean over seeds.
    over_windows = float(np.sqrt((rows.stderr**2).mean()))
    error = over_windows if len(rows) == 1 else float(np.hypot(over_windows, rows.value.sem()))
    if value >= 1e4:  # no language model any more
        return f"{value:.1e}"
    digits = 3 if value < 10 else 2 if value < 100 else 0
    return f"{value:.{digits}f}" if pd.isna(error) else f"{value:.{digits}f} ± {error:.{digits}f}"


def shares(windows: pd.DataFrame, text: str) -> list[Table]:
    """Make the tables that say which share of a sparsifier's loss on `text` a wrapper gives back."""
    parts = []
    for metric, name in (("nll", "nats"), ("kl", "KL")):
        table = analysis.shares(windows, text, metric)
        if not table.empty:
            caption = (
                f"Share of the bare sparsifier's gap to dense that is recovered, in {name}, with the 95 % interval of "
                "a paired bootstrap over windows."
            )
            parts.append(_by_target(table, text, caption))
    return parts


def _by_target(table: pd.DataFrame, title: str, caption: str) -> Table:
    """Make a table of what `analysis` found, with empty cells where a method has nothing at a target."""
    rows = [[m, *(mark(v) for v in table.loc[m])] for m in table.index]
    return Table(title, caption, ["", *(shown_target(t) for t in table.columns)], rows)


def mark(found: Any) -> str:
    """Write a `Loss` or a `Share` as tables have it; nothing for anything else."""
    if not isinstance(found, analysis.Share):
        return str(found) if isinstance(found, analysis.Loss) else ""
    if found.of_nothing:
        return "- (no loss beyond noise)"
    return f"{found} (within noise)" if found.within_noise else str(found)


def sparsities(frame: pd.DataFrame, further: pd.DataFrame, texts: list[str]) -> list[Part]:
    """Show measured byte sparsities: text by text, and as a range over texts under `further` token policies."""
    metrics = [f"{t}_perplexity" for t in texts]
    rows, others = (f[f.metric.isin(metrics) & (f.target > 0) & f.value.notna()] for f in (frame, further))
    if rows.empty:
        return []
    table = rows.pivot_table("byte_sparsity", ["method", "dataset"], "target", sort=False)
    table = table[sorted(table.columns)]
    lines = [
        [*names, *("" if pd.isna(v) else f"{v:.4f}" for v in line)]
        for names, line in zip(table.index, table.to_numpy())
    ]
    title, caption = "Measured byte sparsity", f"On the evaluation text. {_largest_distance(rows)}"
    headers = ["method", "dataset", *(shown_target(t) for t in table.columns)]
    parts: list[Part] = [f"## {title}", Table(title, caption, headers, lines)]
    if others.empty:
        return parts
    policies = list(others.tokens.unique())
    lines = []
    for (method, target), of in others.groupby(["method", "target"], sort=False):
        measured = [of.byte_sparsity[of.tokens == policy] for policy in policies]
        lines.append(
            [method, shown_target(target), *(f"{m.min():.4f} to {m.max():.4f}" if len(m) else "" for m in measured)]
        )
    note = f"Under the other token policies, over the texts. {_largest_distance(others)}"
    return [*parts, Table(title, note, ["method", "target", *policies], lines)]


def _largest_distance(rows: pd.DataFrame) -> str:
    off = (rows.byte_sparsity - rows.target).abs()
    worst = rows.loc[off.idxmax()]
    where = f"{worst.method} at {worst.target:g} on {worst.dataset}"
    return f"The largest distance from a target is {off.max():.4f} ({where})."


def folded(frame: pd.DataFrame, texts: list[str]) -> list[Part]:
    """Compare perplexities of plans with those of the models that would be exported."""
    lines = []
    for text in texts:
        for row in frame[frame.metric == f"{text}_perplexity_folded"].itertuples():
            same = frame[(frame.metric == f"{text}_perplexity") & (frame.method == row.method)]
            same = same[(same.target == row.target) & (same.seed == row.seed)]
            same = same[same.tokens == row.tokens]
            values = [
                f"{same.value.iloc[0]:.4f}",
                f"{row.value:.4f}",
                f"{row.value - same.value.iloc[0]:+.4f}",
            ]
            lines.append([row.method, shown_target(row.target), text, *values])
    caption = (
        "A plan's bias acts on the tokens its masks act on. In an exported model it stands in the linear layer and "
        "acts on every token, the dense first one too. Perplexity in both forms:"
    )
    return _section("Folded biases", caption, ["method", "target", "dataset", "plan", "folded", "difference"], lines)


def on_dense(frame: pd.DataFrame, texts: list[str]) -> list[Part]:
    """Show what the biases of a plan do to the dense model."""
    lines = []
    measured = frame[frame.metric.isin([f"{text}_perplexity_on_dense" for text in texts])]
    for row in measured.itertuples():
        dense = frame[(frame.metric == f"{row.dataset}_perplexity") & (frame.method == "dense")].value.iloc[0]
        same = (frame.method == row.method) & (frame.target == row.target) & (frame.seed == row.seed)
        kl = frame[same & (frame.metric == f"{row.dataset}_kl_on_dense")].value.iloc[0]
        values = [f"{dense:.2f}", f"{row.value:.2f}", f"{kl:.3f}"]
        lines.append([row.method, shown_target(row.target), str(row.seed), row.dataset, *values])
    caption = "Perplexity of the dense model, the same with a plan's biases and no mask, and its KL to the dense model."
    headers = ["method", "target", "seed", "dataset", "dense", "with biases", "KL"]
    return _section("Biases on the dense model", caption, headers, lines)


def _section(title: str, caption: str, headers: list[str], rows: list[list[str]]) -> list[Part]:
    """Make a section of one table; none without rows."""
    return [f"## {title}", Table(title, caption, headers, rows)] if rows else []


def reasons(frame: pd.DataFrame) -> list[Part]:
    """List why numbers are missing, and which ones are off their target.

    All metrics of the same reason stand in one line.
    """
    parts: list[Part] = []
    noted = frame[frame.reason.notna()]
    for title, rows in (("Not measured", noted[noted.value.isna()]), ("Off target", noted[noted.value.notna()])):
        groups = rows.groupby(["method", "target", "reason"], sort=False)
        lines = [
            [method, shown_target(target), ", ".join(dict.fromkeys(of.dataset)), reason]
            for (method, target, reason), of in groups
        ]
        parts += _section(title, "", ["method", "target", "datasets", "reason"], lines)
    return parts


def not_ranked(frame: pd.DataFrame) -> list[Part]:
    """List numbers that no best is chosen from, since they are of another byte sparsity than their target."""
    why = pd.Series(ranking.reasons(frame), index=frame.index)
    found = frame[why != ""].assign(why=why)
    lines = [
        [method, shown_target(target), ", ".join(dict.fromkeys(of.dataset)), tokens, ", ".join(dict.fromkeys(of.why))]
        for (method, target, tokens), of in found.groupby(["method", "target", "tokens"], sort=False)
    ]
    caption = (
        f"Measured bytes are more than {ranking.TOLERANCE:g} from the target, or the masks change nothing: in no table "
        "or plot is such a row the best."
    )
    return _section("Not ranked", caption, ["method", "target", "datasets", "tokens", "reason"], lines)


def losses(table: pd.DataFrame, title: str, tokens: int = 0) -> Table:
    """Make the headline table of what every method loses (`analysis.losses`) on so many tokens, the best in bold."""
    table = jitter.marked(table, tokens)
    caption = (
        "Nats a token above the dense model, mean over the texts, with the 95 % interval of a bootstrap over windows. "
        "**Bold**: the smallest of its column; ≈: within noise of it (paired)."
    )
    if any(isinstance(loss, jitter.NearBest) for loss in table.to_numpy().ravel()):
        caption += " ~: thresholds that are 0.02 % off explain the distance from it."
    return _by_target(table, title, caption)


def reference_shares(table: pd.DataFrame, reference: str, title: str) -> list[Table]:
    """Make the table of shares of one method's loss (`analysis.reference_shares`), if there are any."""
    caption = (
        f"Share of the loss of {reference} in nats that is gone, mean over the texts, with the 95 % interval of a "
        "paired bootstrap over windows."
    )
    return [] if table.empty else [_by_target(table, title, caption)]


def policies(
    windows: pd.DataFrame, texts: list[str], names: list[str], frame: pd.DataFrame | None = None
) -> list[Part]:
    """Make the tables of losses and ranks under every token policy, at the targets that all of them have.

    Parameters
    ----------
    windows : DataFrame
    texts : list of str
    names : list of str
        Of the policies, the suite's own first.
    frame : DataFrame, optional
        The rows of results.csv, which say what is not ranked.
    """
    rows = pd.DataFrame() if frame is None else frame[frame.dataset.isin(texts)]
    out = {name: {} if rows.empty else ranking.unranked(rows[rows.tokens == name]) for name in names}
    found = {name: analysis.losses(windows[windows.tokens == name], texts, out[name]) for name in names}
    if len(found) < 2 or any(table.empty for table in found.values()):
        return []
    title = "Token policies"
    caption = (
        "Nats a token above the dense model, mean over the texts, and the rank of the method. Under a policy that "
        "leaves part of a window dense, only the tokens after it are scored, and every method meets the target on the "
        "tokens that are sparse."
    )
    parts: list[Part] = [f"## {title}"]
    for target in sorted(set.intersection(*(set(table.columns) for table in found.values()))):
        columns = {name: table[target].dropna() for name, table in found.items()}
        methods = [m for m in columns[names[0]].index if all(m in column.index for column in columns.values())]
        ranks = {name: _ranks(column[methods]) for name, column in columns.items()}
        lines = [[m, *(f"{columns[n][m]} ({ranks[n].get(m, '-')})" for n in names)] for m in methods]
        parts.append(Table(title, caption, [f"at {shown_target(target)}", *names], lines))
        caption = ""
    return parts


def _ranks(column: pd.Series) -> dict[str, int]:
    ranked = [method for method in column.index if not column[method].unranked]
    ordered = sorted(ranked, key=lambda m: np.nan_to_num(column[m].value, nan=np.inf))
    return {method: rank for rank, method in enumerate(ordered, 1)}


def allocations(cells: list[dict[str, Any]]) -> list[Part]:
    """Make the table of mean ratios by projection, of methods that do not rest the same share everywhere."""
    uneven = [cell for cell in cells if len(set(cell.get("ratios", {}).values())) > 1]
    return _by_site(uneven, "ratios", "Allocation", "nominal ratio of inputs at rest")


def refined(cells: list[dict[str, Any]]) -> list[Part]:
    """Make the table of mean factors by projection that training multiplied thresholds with."""
    what = "factor that training multiplied a threshold with"
    return _by_site(cells, "threshold_factors", "Refined thresholds", what)


def splits(cells: list[dict[str, Any]]) -> list[Part]:
    """Make the table of mean shares of the budget for channels (rho) by projection, where they were searched for."""
    searched = [cell for cell in cells if isinstance(cell.get("rho"), dict)]
    return _by_site(searched, "rho", "Share of the budget for channels", "rho that the search found")


def _by_site(cells: list[dict[str, Any]], key: str, title: str, what: str) -> list[Part]:
    """Make a section with the means by projection of what `cells` have by site under `key`; none where none has."""
    cells = [cell for cell in cells if cell.get(key)]
    groups = list(dict.fromkeys(Site.parse(site).group for cell in cells for site in cell[key]))
    groups.sort(key=lambda group: PROJECTIONS.index(group) if group in PROJECTIONS else len(PROJECTIONS))
    lines = [[cell["method"], shown_target(cell["target"]), *_by_group(cell[key], groups)] for cell in cells]
    about = f"Mean over blocks of the {what}, by projection."
    return _section(title, about, ["method", "target", *groups], lines)


def _by_group(values: dict[str, float], groups: list[str]) -> list[str]:
    """Average one value per site over blocks and experts; empty where a projection has none."""
    by_group: dict[str, list[float]] = {group: [] for group in groups}
    for site, value in values.items():
        by_group[Site.parse(site).group].append(value)
    return [f"{sum(v) / len(v):.2f}" if v else "" for v in by_group.values()]


MEAN = re.compile(r"mean\((.+)\)/(.+)")
"""A metric that stands for the mean over several tasks."""


def value_of(frame: pd.DataFrame, method: str, target: float, metric: str) -> tuple[float, float] | None:
    """Look up what was measured of one method, mean over seeds, and its measured share of bytes at rest.

    A metric such as ``mean(piqa,arc_easy)/acc`` is the mean over these tasks, none where one of them is lacking.
    """
    rows = frame[(frame.method == method) & (frame.target == target) & frame.value.notna()]
    found = MEAN.fullmatch(metric)
    wanted = [metric] if found is None else [f"{task}/{found[2]}" for task in found[1].split(",")]
    rows = rows[rows.metric.isin(wanted)]
    means = rows.groupby("metric").value.mean()
    return None if len(means) < len(wanted) else (float(means.mean()), float(rows.byte_sparsity.mean()))


def published(frame: pd.DataFrame, figures: list[dict[str, Any]]) -> list[Part]:
    """List figures of the literature beside the measured ones."""
    lines = []
    for figure in figures:
        same = frame[(frame.method == figure["method"]) & (frame.target == figure["target"])]
        same = same[(same.metric == figure["metric"]) & (same.model == figure["model"])]
        measured = same.value.dropna()
        shown = f"{measured.mean():.4g}" if len(measured) else "not measured"
        lines.append(
            [
                *(figure["model"], figure["method"], shown_target(figure["target"]), figure["metric"]),
                *(f"{figure['value']:g}", figure["tag"], shown, figure["source"]),
            ]
        )
    caption = (
        "Trust: C read in released code or artefacts, A in the abstract or README, D derived from shapes, S second "
        "hand (another paper's text or notes; not checked against the paper)."
    )
    headers = ["model", "method", "target", "metric", "published", "trust", "measured", "source"]
    return _section("Published figures", caption, headers, lines)
