"""Measures which neurons are active on every token of a sequence, against its length."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.report.plots import plt, save
from resting.benchmarks.report.table import markdown, shown_target
from resting.benchmarks.studies.study import Study, write
from resting.sparsifier import Decoder, OnProgress, Site, Statistic
from resting.sparsifier.logits import final_hidden

READERS = {"q": "input of q, k, v", "o": "input of o", "gate": "input of gate, up", "down": "input of down"}
LONGEST, WINDOWS = 2048, 8
COLOURS = {"q": "#0072B2", "o": "#E69F00", "gate": "#009E73", "down": "#CC79A7"}


@torch.no_grad()
def measure(loaded: LoadedModel, targets: list[float], text: str) -> pd.DataFrame:
    """Measure the fraction of channels with ``|x_t| > t`` for all of the first tokens, by target, role and length.

    Of the dense model, with TEAL's thresholds at `targets`; mean over windows and blocks. The first token of a
    window is left out: its activations are an attention sink's.
    """
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", LONGEST + 1)
    longest = 1 << ((min(LONGEST, limit - 1)).bit_length() - 1)
    windows = loaded.windows(text, "evaluation", longest + 1, WINDOWS).ids
    cell_fitting = loaded.calibrated_for(None)
    statistics = cell_fitting.statistics(frozenset({Statistic.HISTOGRAM}))
    decoder = Decoder.of(loaded.model)
    lengths = [1 << i for i in range(longest.bit_length())]
    sums = {(target, role): torch.zeros(len(lengths), dtype=torch.float64) for target in targets for role in READERS}

    def see(site: Site, x: Tensor) -> None:
        magnitudes = x[0, 1:].float().abs()
        for target in targets:
            active = magnitudes > statistics[site].quantile(target)
            always = active.cummin(0).values.double().mean(1).cpu()
            sums[target, site.role] += always[[length - 1 for length in lengths]]

    with ExitStack() as stack:
        for site in decoder.sites(tuple(READERS)):
            hook = decoder.linear(site).register_forward_pre_hook(lambda m, args, site=site: see(site, args[0]))
            stack.callback(hook.remove)
        for done, ids in enumerate(windows, 1):
            final_hidden(loaded.model, ids[None].to(loaded.device))
            loaded.on_progress("anchors", done, len(windows), "windows")
    count = len(windows) * decoder.blocks
    return pd.DataFrame(
        {"target": target, "role": role, "length": length, "active_on_all": float(total) / count}
        for (target, role), totals in sums.items()
        for length, total in zip(lengths, totals)
    )


def run(study: Study, on_progress: OnProgress) -> Path:
    """Measure, and write table and plots into ``OUTPUT/SUITE-anchors``."""
    text = study.suite.evaluation.texts[0]
    targets = sorted(study.suite.targets)
    frame = measure(study.loaded(on_progress), targets, text)
    shown = [length for length in (1, 4, 16, 64, 256, 2048) if length in set(frame.length)]
    lines = []
    for target in targets:
        for role, name in READERS.items():
            of = frame[(frame.target == target) & (frame.role == role)].set_index("length").active_on_all
            lines.append([shown_target(target), name, *(f"{of[length]:.4f}" for length in shown)])
        lines.append([shown_target(target), "independent, (1 - s)^L", *(f"{(1 - target) ** n:.4f}" for n in shown)])
    about = (
        "Fraction of channels that are active (above TEAL's threshold) on each of the first L tokens of a window of "
        f"{text}, the first token left out; dense model, mean over windows and blocks."
    )
    folder = study.folder("anchors")
    _plot(frame, folder, study.title)
    parts = [about, "![Fraction of neurons active on all tokens](anchors.png)"]
    parts.append(markdown(lines, ["sparsity", "neurons", *(f"L = {n}" for n in shown)]))
    return write(study, "anchors", "Neurons that are active on all tokens", parts, frame)


def _plot(frame: pd.DataFrame, folder: Path, title: str) -> None:
    targets = list(frame.target.unique())
    figure, axes = plt.subplots(1, len(targets), figsize=(3.6 * len(targets) + 0.6, 3.9), squeeze=False, sharey=True)
    for axis, target in zip(axes[0], targets):
        for (role, name), marker in zip(READERS.items(), "osD^"):
            of = frame[(frame.target == target) & (frame.role == role) & (frame.active_on_all > 0)]
            style = {"color": COLOURS[role], "marker": marker, "markersize": 4, "linewidth": 1.3}
            axis.plot(of.length, of.active_on_all, label=name, **style)
        lengths = sorted(frame.length.unique())
        axis.plot(lengths, [(1 - target) ** n for n in lengths], "--", color="0.4", label="independent, $(1-s)^L$")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(1e-5, 1.2)
        axis.grid(axis="y", color="0.9", linewidth=0.6)
        axis.set_title(f"sparsity {target:g}", fontsize=10)
        axis.set_xlabel("sequence length L")
    axes[0][0].set_ylabel("fraction active on all tokens")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.suptitle(title)
    save(figure, folder, "anchors")
