"""Plots of a result folder, readable in grey."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Colour-blind safe (Okabe-Ito), and told apart in grey by marker and dash.
STYLES: list[dict[str, Any]] = [
    {"color": "#0072B2", "marker": "o", "linestyle": "-"},
    {"color": "#E69F00", "marker": "s", "linestyle": ":"},
    {"color": "#009E73", "marker": "D", "linestyle": "--"},
    {"color": "#CC79A7", "marker": "^", "linestyle": "-."},
    {"color": "#56B4E9", "marker": "v", "linestyle": (0, (5, 1, 1, 1, 1, 1))},
    {"color": "#D55E00", "marker": "P", "linestyle": (0, (1, 1))},
]

plt.rcParams |= {
    "svg.hashsalt": "resting",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def perplexity(frame: pd.DataFrame, texts: list[str], title: str, folder: Path, prefix: str = "") -> list[str]:
    """Perplexity against measured byte sparsity, one panel a text, one line a method.

    Returns
    -------
    list of str
        The files written, PNG first.
    """
    figure, axes = plt.subplots(1, len(texts), figsize=(3.6 * len(texts) + 0.6, 3.7), squeeze=False)
    for axis, text in zip(axes[0], texts):
        rows = frame[frame.metric == f"{text}_perplexity"]
        _panel(axis, rows, text)
    axes[0][0].set_ylabel("perplexity (log scale)")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    figure.suptitle(title)
    figure.set_layout_engine("constrained")
    files = []
    for kind in ("png", "svg"):
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        figure.savefig(folder / f"{prefix}perplexity.{kind}", dpi=160, metadata=metadata)
        files.append(f"{prefix}perplexity.{kind}")
    plt.close(figure)
    return files


def _panel(axis: plt.Axes, rows: pd.DataFrame, text: str) -> None:
    dense = rows[rows.method == "dense"]
    if len(dense):
        level = float(dense.value.iloc[0])
        axis.axhline(level, color="0.4", linewidth=1, label="dense")
        axis.annotate(
            f"dense {level:.1f}",
            (0, level),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            color="0.3",
            fontsize=8,
        )
    methods = [m for m in rows.method.unique() if m != "dense"]
    for style, method in zip(STYLES * (1 + len(methods) // len(STYLES)), methods):
        of = rows[rows.method == method].groupby("target_sparsity").agg({"byte_sparsity": "mean", "value": "mean"})
        axis.plot(of.byte_sparsity, of.value, label=method, markersize=4.5, linewidth=1.4, **style)
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.grid(axis="y", color="0.9", linewidth=0.6)
    sparse = rows[rows.method != "dense"].byte_sparsity
    one_target = rows[rows.method != "dense"].target_sparsity.nunique() == 1
    axis.set_xlim(sparse.min() - 0.01 if one_target else 0.0, sparse.max() + (0.01 if one_target else 0.03))
    axis.set_xlabel("measured byte sparsity")
    axis.set_title(text, fontsize=10)
