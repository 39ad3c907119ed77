"""Measures what several tokens at once read: the union of their masks, and the channels that all of them read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from resting.benchmarks import cache
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.suite import EvaluationConfig
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.plans import fitted
from resting.benchmarks.report.plots import plt, save
from resting.benchmarks.report.table import markdown, shown_target
from resting.benchmarks.studies.study import Study, write
from resting.sparsifier import ACT, Meter, OnProgress, Plan, Site, SparsifierError, TokenPolicy
from resting.sparsifier.logits import final_hidden
from resting.sparsifier.meter import Share
from resting.sparsifier.policy import Selection
from resting.sparsifier.roles import INPUT_OF

TOGETHER = (1, 2, 4, 8, 16, 64)
"""Tokens whose masks are united."""
SEQUENCES, LENGTH, BATCHES = 64, 128, 4
"""Sequences that run side by side, sparse tokens of each, and how often new ones are taken."""
INPUTS = {
    "attention": "input of q, k, v",
    "o": "input of o",
    "mlp": "input of gate, up",
    "down": "input of down",
    ACT: "activated gate",
}
ALL = "all, by bytes"
NEARLY_ALWAYS = (0.95, 0.99)
"""Shares of tokens from which on a channel is nearly always active."""
ORDERS = {"consecutive": "consecutive tokens", "same step": "different sequences, same step"}


@dataclass
class Channels:
    """Sums over tokens what one mask keeps.

    Attributes
    ----------
    elements : float
        Weights that the sites behind it read where nothing rests.
    tokens : int
    kept : Tensor [channels]
        Tokens that keep each channel.
    groups, united : dict of (order, tokens together) to number
        Groups of tokens seen, and the sum of their unions' densities.
    """

    elements: float = 0.0
    tokens: int = 0
    kept: Tensor | float = 0.0
    groups: dict[tuple[str, int], int] = field(default_factory=lambda: defaultdict(int))
    united: dict[tuple[str, int], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, kept: Tensor) -> None:
        """Add the masks `kept` [sequences, steps, channels], True where a channel is read."""
        self.tokens += kept.shape[0] * kept.shape[1]
        self.kept = self.kept + kept.sum((0, 1)).double().cpu()
        # Cut into groups along one axis, and united over it: along the sequence, or across the batch.
        for order, masks in (("consecutive", kept), ("same step", kept.transpose(0, 1))):
            for count in TOGETHER:
                for union in unions(masks, count):
                    self.groups[order, count] += union.shape[0] * union.shape[1]
                    self.united[order, count] += float(union.double().mean(-1).sum())

    @property
    def density(self) -> Tensor:
        """The share of tokens that read each channel, [channels]."""
        assert isinstance(self.kept, Tensor)
        return self.kept / self.tokens

    def independent(self, count: int) -> float:
        """Compute the union's density if tokens chose each channel by its density, independently of one another."""
        return float((1.0 - (1.0 - self.density) ** count).mean())


def unions(masks: Tensor, count: int) -> Iterator[Tensor]:
    """Unite `masks` [rows, n, channels] over groups of `count` neighbours: [rows, n // count, channels], where any is.

    What is left over at the end of a row is in no group.
    """
    groups = masks.shape[1] // count
    if groups:
        yield masks[:, : groups * count].unflatten(1, (groups, count)).any(2)


class UnionMeter(Meter):
    """Counts what a meter counts, and shows every mask once to the `Channels` of what reads through it.

    Parameters
    ----------
    last : int, optional
        Show the last so many tokens of every sequence alone; the meter counts all of them.
    """

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self._last = last
        self.channels: dict[Site, Channels] = defaultdict(Channels)
        """By the first site that reads through a mask."""
        self._first: dict[tuple[int, str, str], Site] = {}
        self._sized: set[Site] = set()

    def record(
        self,
        site: Site,
        kept: Tensor,
        selection: Selection,
        share: Share | None = None,
        counts: Tensor | None = None,
    ) -> Share:
        if site.is_expert:
            raise SparsifierError("the study of unions is of models whose tokens all go through the same layers")
        place = site.block, site.part, INPUT_OF.get(site.role, site.role)
        if share is None or place not in self._first:  # others read the same kept input
            self._first[place] = site
            self.channels[site].add(_by_sequence(kept, selection, self._last))
        if site not in self._sized:
            self._sized.add(site)
            self.channels[self._first[place]].elements += self._weights_of(site)
        return super().record(site, kept, selection, share, counts)

    def _weights_of(self, site: Site) -> float:
        assert self._decoder is not None
        if site.role != ACT:
            return float(self._elements[site])
        under = self._decoder.rests_under_act(site)
        return sum(self._elements[s] * part for s, part in under.items())


def _by_sequence(kept: Tensor, selection: Selection, last: int | None) -> Tensor:
    """Show which channels the sparse tokens of every sequence read: [sequences, steps, channels] of bool."""
    assert selection.shape is not None
    assert selection.sparse is None
    first = selection.dense if last is None else max(selection.dense, selection.shape[1] - last)
    return selection.by_token(kept)[:, first:] != 0


@torch.no_grad()
def observe(
    model: torch.nn.Module,
    plan: Plan,
    windows: Tensor,
    policy: TokenPolicy,
    batch: int,
    done: Callable[[int], None] = lambda count: None,
    last: int | None = None,
) -> UnionMeter:
    """Run `windows` [n, length] under `plan`, `batch` sequences side by side, and keep what their masks have in common.

    Of `last`, see `UnionMeter`.

    Raises
    ------
    SparsifierError
        If the model has experts.
    """
    meter, device = UnionMeter(last), next(model.parameters()).device
    with plan.applied(model, policy, meter):
        for start in range(0, len(windows), batch):
            final_hidden(model, windows[start : start + batch].to(device))
            done(min(start + batch, len(windows)))
    return meter


def union_rows(meter: UnionMeter) -> list[dict[str, object]]:
    """List density and reference line by input, order and number of tokens: means over blocks, or by bytes."""
    rows: list[dict[str, object]] = []
    for name, of in _by_input(meter).items():
        weights = [one.elements if name == ALL else 1.0 for one in of]
        for order in ORDERS:
            for count in TOGETHER:
                if not all(one.groups[order, count] for one in of):
                    continue  # fewer tokens ran side by side
                found = [one.united[order, count] / one.groups[order, count] for one in of]
                rows.append(
                    {"input": name, "order": order, "tokens": count, "density": _mean(found, weights)}
                    | {"independent": _mean([one.independent(count) for one in of], weights)}
                )
    return rows


def always_rows(meter: UnionMeter) -> list[dict[str, object]]:
    """List the share of channels that nearly every token reads, and of bytes that lie behind them.

    Columns `channels` (of all channels), `bytes` (of all weight bytes under masks) and `of_read` (of the bytes that a
    token reads of them, on average).
    """
    rows: list[dict[str, object]] = []
    by_input = _by_input(meter)
    whole = sum(one.elements for one in meter.channels.values())
    for name, of in by_input.items():
        for share in NEARLY_ALWAYS:
            often = [one.density > share for one in of]
            behind = sum(one.elements * float(found.double().mean()) for one, found in zip(of, often))
            read = sum(one.elements * float((one.density * found).mean()) for one, found in zip(of, often))
            all_read = sum(one.elements * float(one.density.mean()) for one in of)
            channels = sum(int(found.sum()) for found in often) / sum(len(found) for found in often)
            rows.append(
                {"input": name, "above": share, "channels": channels, "bytes": behind / whole}
                | {"of_read": read / all_read if all_read else 0.0}
            )
    return rows


def _by_input(meter: UnionMeter) -> dict[str, list[Channels]]:
    """Sort masks by what they are masks of, with all of them together last."""
    found: dict[str, list[Channels]] = {}
    for site, channels in meter.channels.items():
        found.setdefault(INPUT_OF.get(site.role, site.role), []).append(channels)
    order = [name for name in INPUTS if name in found]
    order += [name for name in found if name not in order]
    return {name: found[name] for name in order} | {ALL: list(meter.channels.values())}


def _mean(values: list[float], weights: list[float]) -> float:
    return sum(v * w for v, w in zip(values, weights)) / sum(weights)


def measure(
    loaded: LoadedModel, cells: list[Cell], text: str, evaluation: EvaluationConfig
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Measure unions and always-active channels under the plan of every cell.

    Of a suite that scores the last tokens of its windows, those are looked at, after the context that they have there;
    of others windows of `LENGTH`.

    Raises
    ------
    SuiteError
        If no cell masks anything.
    """
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", LENGTH + 1)
    if evaluation.scored is None:
        windows = loaded.windows(text, "evaluation", min(LENGTH + 1, limit), SEQUENCES * BATCHES).ids
    else:
        length, count = evaluation.window, evaluation.windows
        windows = loaded.windows(text, "evaluation", length, count, stride=evaluation.stride).ids
    # Rows of one batch are as far from one another in the text as they can be.
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
    united, always = [], []
    for cell in cells:
        if cell.config.name == "dense":
            continue
        plan, name = fitted(loaded, cell), f"{cell.label} at {cell.target:g}"

        def done(count: int, name: str = name) -> None:
            loaded.on_progress(name, count, len(windows), "windows")

        meter = observe(loaded.model, plan, windows, cell.policy, _beside(evaluation), done, evaluation.scored)
        about = {"method": cell.label, "target": cell.target, "byte_sparsity": meter.byte_sparsity()}
        united += [about | row for row in union_rows(meter)]
        always += [about | row for row in always_rows(meter)]
    if not united:
        raise SuiteError("the study of unions needs a suite with a method that masks something")
    return pd.DataFrame(united), pd.DataFrame(always)


def run(study: Study, on_progress: OnProgress) -> Path:
    """Measure, and write tables and a plot into ``OUTPUT/SUITE-union``."""
    evaluation = study.suite.evaluation
    text = evaluation.texts[0]
    united, always = measure(study.loaded(on_progress), study.cells(), text, evaluation)
    folder = study.folder("union")
    cache.write_whole(folder / "always-active.csv", always.to_csv(index=False, float_format="%.7g"))
    _plot(united, folder, study.title)
    about = (
        "D(B): the share of channels that at least one of B tokens keeps, which is what a product for B tokens has to "
        f"read. On {text}, {_beside(evaluation)} sequences side by side, of {_tokens_of(evaluation)}; "
        "mean over blocks. Consecutive tokens are those of a prompt in pieces or of speculative decoding; tokens of "
        "different sequences at the same step are those of a batch. In brackets the reference line: what D(B) would be "
        "if tokens chose each channel by its own density, independently, 1 - (1 - p_i)^B averaged over channels i."
    )
    parts = [about, "![The union of masks against the number of tokens](union.png)"]
    for (method, target), of in united.groupby(["method", "target"], sort=False):
        parts.append(f"## {method} at {shown_target(target)}")
        parts.append(_union_table(of))
    parts += ["## Channels that nearly every token reads", _always_about(), _always_table(always)]
    return write(study, "union", "The union of the masks of several tokens", parts, united)


def _beside(evaluation: EvaluationConfig) -> int:
    return SEQUENCES if evaluation.scored is None else evaluation.batch_size


def _tokens_of(evaluation: EvaluationConfig) -> str:
    if evaluation.scored is None:
        return f"{LENGTH} sparse tokens, the first token left out"
    return f"{evaluation.window} tokens each, the last {evaluation.scored} of which are looked at"


def _union_table(frame: pd.DataFrame) -> str:
    counts = sorted(frame.tokens.unique())
    lines = []
    for (name, order), of in frame.groupby(["input", "order"], sort=False):
        at = of.set_index("tokens")
        cells = [f"{at.density[n]:.3f} ({at.independent[n]:.3f})" if n in at.index else "" for n in counts]
        lines.append([INPUTS.get(name, name), ORDERS[order], *cells])
    return markdown(lines, ["mask of", "tokens", *(f"B = {n}" for n in counts)])


def _always_about() -> str:
    return (
        "The share of channels that more than so many of all tokens keep; the share of all weight bytes under masks "
        "that lie behind them; and their share of the bytes that a token reads there."
    )


def _always_table(frame: pd.DataFrame) -> str:
    lines = []
    for (method, target, name), of in frame.groupby(["method", "target", "input"], sort=False):
        cells = [f"{getattr(row, key):.2%}" for key in ("channels", "bytes", "of_read") for row in of.itertuples()]
        lines.append([method, shown_target(target), INPUTS.get(name, name), *cells])
    heads = [
        f"{what}, > {share:.0%}" for what in ("channels", "of all bytes", "of bytes read") for share in NEARLY_ALWAYS
    ]
    return markdown(lines, ["method", "target", "mask of", *heads])


COLOURS = {"attention": "#0072B2", "o": "#E69F00", "mlp": "#009E73", "down": "#CC79A7", ACT: "#D55E00", ALL: "#000000"}


def _plot(frame: pd.DataFrame, folder: Path, title: str) -> None:
    """Draw a row of panels for every method, one a target; dashed is the reference line of all, by bytes."""
    methods, targets = list(frame.method.unique()), sorted(frame.target.unique())
    size = (3.4 * len(targets) + 0.8, 3.4 * len(methods) + 0.8)
    figure, axes = plt.subplots(len(methods), len(targets), figsize=size, squeeze=False, sharex=True, sharey=True)
    for row, method in zip(axes, methods):
        for axis, target in zip(row, targets):
            here = frame[(frame.method == method) & (frame.target == target)]
            for name in here.input.unique():
                colour = COLOURS.get(name, "#7F7F7F")
                for order, style, marker in (("consecutive", "-", "o"), ("same step", ":", "s")):
                    of = here[(here.input == name) & (here.order == order)]
                    label = f"{INPUTS.get(name, name)}, {order}"
                    axis.plot(of.tokens, of.density, style, color=colour, marker=marker, markersize=3, label=label)
            of = here[(here.input == ALL) & (here.order == "consecutive")]
            axis.plot(of.tokens, of.independent, "--", color="0.5", label="independent tokens, by bytes")
            axis.set_xscale("log", base=2)
            axis.set_ylim(0.0, 1.02)
            axis.grid(axis="y", color="0.9", linewidth=0.6)
            axis.set_title(f"{method} at {target:g}", fontsize=10)
        row[0].set_ylabel("share read by at least one")
    for axis in axes[-1]:
        axis.set_xlabel("tokens B")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.suptitle(title)
    save(figure, folder, "union")
