"""Tables of products from codes of quantised weights: against dense ones of as many bits, and against plain ones."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from resting.benchmarks.report.folder import read_table
from resting.benchmarks.report.table import Part, Table, shown_target

FILE = "quantised.csv"
NEEDED = ["matrix", "dtype", "weights", "threads", "reason"]


def sections(folder: Path) -> list[Part]:
    """Make the tables of `FILE`; nothing where there is none."""
    if not (folder / FILE).exists():
        return []
    frame = read_table(folder / FILE, NEEDED)
    parts: list[Part] = [
        "## Matrices from codes",
        "One product of one token from the codes of quantised weights, which lie input-major with their scales: the "
        "kernel reads both of active inputs only, and dequantises in registers. Dense is the fastest of the kernel "
        "with nothing at rest and of torch's own product from as many bits; plain is the fastest dense product of "
        "weights in the dtype of the input. In the tables: the dense time over the kernel's (20th percentiles, in "
        "turn), and in brackets the plain one's over it.",
    ]
    done = frame[frame.seconds.notna()] if "seconds" in frame else frame.iloc[:0]
    for (dtype, threads), group in done.groupby(["dtype", "threads"], sort=False):
        title = f"{dtype}, {threads} thread{'s' * (threads > 1)}, from codes"
        sparsities = sorted(s for s in group.sparsity.unique() if s > 0)
        lines = []
        for (matrix, weights), of in group.groupby(["matrix", "weights"], sort=False):
            codes = of[of.kernel == "codes"].set_index("sparsity")
            first = codes.iloc[0]
            times = of.set_index("kernel").seconds
            lines.append(
                [
                    f"{matrix}, {weights}",
                    f"{1e6 * times[first.best_plain]:.0f}, {first.best_plain}",
                    f"{1e6 * first.seconds * first.speedup:.0f}, {_named(first.best_dense)}",
                    f"{1e6 * codes.seconds[0.0]:.0f}",
                    *(_ratio(codes.loc[s]) if s in codes.index else "" for s in sparsities),
                ]
            )
        heads = ["", "plain, µs", "dense, µs", "kernel at 0, µs", *(shown_target(s) for s in sparsities)]
        parts += [f"### {title}", Table(title, "", heads, lines)]
    lacking = frame[frame.reason.notna() & (frame.reason != "")]
    if not lacking.empty:
        lines = [[r.matrix, r.dtype, r.weights, r.reason] for r in lacking.itertuples()]
        parts += ["### Not timed", Table("Not timed", "", ["matrix", "dtype", "weights", "reason"], lines)]
    return parts


def _named(kernel: str) -> str:
    return "kernel" if kernel == "codes 0" else kernel


def _ratio(row: pd.Series) -> str:
    return f"{row.speedup:.2f} ({row.over_plain:.2f})"
