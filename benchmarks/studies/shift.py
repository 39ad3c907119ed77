"""Measures how far the residual stream of a sparse model is from the dense one, block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.plans import fitted
from resting.benchmarks.report.plots import plt, save
from resting.benchmarks.report.style import styles
from resting.benchmarks.report.table import markdown, shown_target
from resting.benchmarks.studies.study import Study, write
from resting.sparsifier import Decoder, OnProgress, SparsifierError
from resting.sparsifier.logits import final_hidden


class _Sums:
    """Of the difference of one block's hidden states, over tokens."""

    def __init__(self) -> None:
        self.tokens, self.length, self.square, self.dense = 0, 0.0, 0.0, 0.0
        self.total: Tensor | float = 0.0

    def add(self, dense: Tensor, sparse: Tensor) -> None:
        """Add hidden states [tokens, hidden]."""
        difference = (sparse - dense).double()
        lengths = difference.norm(dim=1)
        self.tokens += len(dense)
        self.length += float(lengths.sum())
        self.square += float(lengths.square().sum())
        self.dense += float(dense.double().norm(dim=1).sum())
        self.total = self.total + difference.sum(0)

    def row(self) -> dict[str, float]:
        """Return the mean length, relative to the dense states', and its parts: ``E|d|^2 = |E d|^2 + E|d - E d|^2``."""
        assert isinstance(self.total, Tensor)
        mean = float((self.total / self.tokens).norm())
        square = self.square / self.tokens
        return {
            "l2": self.length / self.tokens,
            "relative": self.length / self.dense,
            "mean_part": mean,
            "remainder": max(0.0, square - mean**2) ** 0.5,
            "share_of_mean": mean**2 / square if square else 0.0,
            "tokens": self.tokens,
        }


@torch.no_grad()
def measure(loaded: LoadedModel, cells: list[Cell], text: str, skipped: Callable[[str], None] = print) -> pd.DataFrame:
    """Measure the shift by method, target, seed and block, over all tokens of the windows of `text` but the first.

    A constant that were added at that point could remove nothing but the mean part, ``|E d|``.
    """
    windows = loaded.reference(text).windows
    rows = []
    for cell in cells:
        if cell.config.name == "dense":
            continue
        try:
            plan = fitted(loaded, cell)
        except SparsifierError as error:  # above a ceiling, say: no row
            skipped(f"{cell.label} at {cell.target:g}: {error}")
            continue
        layers = Decoder.of(loaded.model).layers
        sums = [_Sums() for _ in layers]
        for done, ids in enumerate(windows.split(2), 1):
            ids = ids.to(loaded.device)
            dense = block_outputs(loaded.model, layers, ids)
            with plan.applied(loaded.model, cell.policy):
                sparse = block_outputs(loaded.model, layers, ids)
            for of, d, s in zip(sums, dense, sparse):
                of.add(d[:, 1:].flatten(0, 1), s[:, 1:].flatten(0, 1))
            loaded.on_progress(f"shift of {cell.label}", done, -(-len(windows) // 2), "batches")
        at = {"method": cell.label, "target": cell.target, "seed": cell.seed}
        rows += [at | {"block": block} | of.row() for block, of in enumerate(sums)]
    if not rows:
        raise SuiteError("the study of shifts needs a suite with a sparsifier that can be fitted")
    return pd.DataFrame(rows)


def block_outputs(model: Any, layers: Iterable[nn.Module], ids: Tensor) -> list[Tensor]:
    """Return the residual stream after each of `layers`, [batch, length, hidden] each."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).float())

    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.register_forward_hook(keep).remove)
        final_hidden(model, ids)
    return seen


def run(study: Study, on_progress: OnProgress) -> Path:
    """Measure, and write table and plots into ``OUTPUT/SUITE-shift``."""
    loaded, cells = study.loaded(on_progress), study.cells()
    text = study.suite.evaluation.texts[0]
    frame = measure(loaded, cells, text)
    means = frame.groupby(["method", "target"], sort=False)[["relative", "share_of_mean"]].mean().reset_index()
    last = frame[frame.block == frame.block.max()].groupby(["method", "target"]).mean(numeric_only=True)
    lines = [
        [
            *(m.method, shown_target(m.target), f"{m.relative:.3f}", f"{100 * m.share_of_mean:.1f} %"),
            *(f"{last.loc[(m.method, m.target), c]:.3f}" for c in ("relative", "mean_part", "remainder")),
        ]
        for m in means.itertuples()
    ]
    headers = ["method", "target", "relative", "of it the mean", "last block: relative", "mean part", "remainder"]
    about = (
        f"L2 distance of the residual stream to the dense model's, after every block, on {text}; relative to the "
        "length of the dense states. Mean over blocks, with the share of the mean square that is the mean over tokens, "
        "the only part that a constant at that point could remove; and after the last block."
    )
    folder = study.folder("shift")
    parts = [about, "![Relative shift by block](shift.png)", markdown(lines, headers)]
    _plot(frame, folder, study.title)
    return write(study, "shift", "Hidden-state shift", parts, frame)


def _plot(frame: pd.DataFrame, folder: Path, title: str) -> None:
    targets = list(frame.target.unique())
    looks = {method: look.line for method, look in styles(frame.method.unique()).items()}
    figure, axes = plt.subplots(2, len(targets), figsize=(4.4 * len(targets) + 0.6, 5.6), squeeze=False, sharex=True)
    for column, target in enumerate(targets):
        for (axis, name), label in zip(
            ((axes[0][column], "relative"), (axes[1][column], "share_of_mean")),
            ("distance / length of dense", "share of the mean in it"),
        ):
            for method, of in frame[frame.target == target].groupby("method", sort=False):
                values = of.groupby("block")[name].mean()
                axis.plot(values.index, values, label=method, markersize=3.5, **looks[str(method)])
            axis.set_ylabel(label)
            axis.set_ylim(bottom=0)
            axis.grid(axis="y", color="0.9", linewidth=0.6)
        axes[0][column].set_title(f"at {target:g}", fontsize=10)
        axes[1][column].set_xlabel("block")
    shown = [axis.get_legend_handles_labels() for axis in axes[0]]
    by_label = {label: handle for handles, labels in shown for handle, label in zip(handles, labels)}
    figure.legend(by_label.values(), by_label, loc="outside lower center", ncols=min(4, len(by_label)), frameon=False)
    figure.suptitle(title)
    save(figure, folder, "shift")
