"""Writes what several results folders say together: README.md, pictures, tables, and all numbers in across.csv."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from resting.benchmarks import cache
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.labels import innermost
from resting.benchmarks.names import ACROSS
from resting.benchmarks.report import export, notes
from resting.benchmarks.report.across.changes import Ends
from resting.benchmarks.report.across.joined import Joined, Place, read
from resting.benchmarks.report.across.numbers import Number, What, changed, number
from resting.benchmarks.report.plots import across as plots
from resting.benchmarks.report.plots import draw
from resting.benchmarks.report.style import BROKEN
from resting.benchmarks.report.table import Part, Table, markdown, shown_target

TITLES = {"size": "Loss against the size of models", "length": "Loss against the length of contexts"}
ENDS = {"size": ("smallest", "largest"), "length": ("shortest", "longest")}
X_LABELS = {"size": "models by weights in their blocks", "length": "tokens of a window"}
KINDS: tuple[What, What] = ("losses", "shares")
OWN = ("results.csv", "decode.csv", "provenance.json")
"""Files of a results folder, whose report nothing here replaces."""


def write(paths: Sequence[Path], folder: Path) -> Path:
    """Join the results folders `paths`, and write the report into `folder`.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    BenchmarkError
        If the folders do not belong into one table, or `folder` holds results of its own.
    """
    if held := [name for name in OWN if (folder / name).exists()]:
        raise BenchmarkError(f"{folder} holds results ({held[0]}), whose README.md would be replaced; allowed: another")
    joined = read(paths)
    if not joined.targets:
        raise BenchmarkError("no target has a number in two of these folders; allowed: folders with a common target")
    folder.mkdir(parents=True, exist_ok=True)
    parts: list[Part] = [f"# {TITLES[joined.by]}", *_about(joined, folder)]
    parts += _losses(joined, folder)
    parts += _shares(joined, folder)
    words = ["resting", "across", *(_relative(path, Path.cwd()) for path in paths), "--into", str(folder)]
    parts.append(f"## Provenance\n\nWritten from the folders above, by `{shlex.join(words)}`; all numbers: `{ACROSS}`.")
    parts += notes.section(folder)
    cache.write_whole(folder / ACROSS, _rows(joined).to_csv(index=False, float_format="%.6g"))
    export.write(folder, parts)
    return folder


def _relative(path: Path, to: Path) -> str:
    return Path(os.path.relpath(path.resolve(), to.resolve())).as_posix()


def _about(joined: Joined, folder: Path) -> list[Part]:
    """Say what was measured, and on what."""
    suite, first = joined.suite, joined.places[0]
    evaluation, calibration = suite["evaluation"], suite["calibration"]
    last = f", of which the last {evaluation['scored']} are scored" if evaluation.get("scored") else ""
    window = "of the lengths below" if joined.by == "length" else f"of {evaluation['window']} tokens"
    what = {
        "size": (
            "Models are ordered by the weights in the matrices of their blocks, which are what methods leave unread. "
            "They differ in family, in training text and in how they were quantised, too: what stands here is no law "
            "of size."
        ),
        "length": f"The model is {first.model}. Contexts are ordered by the tokens of a window.",
    }
    heads = [
        "model",
        "weights in blocks" if joined.by == "size" else "window",
        "windows",
        "begin with",
        "on",
        "results",
    ]
    lines = [
        [
            place.model,
            f"{place.size:,}" if joined.by == "size" else f"{place.length:,}",
            _counts(place),
            " ".join(f"`{token}`" for token in place.begins_with) or "no BOS token",
            place.device,
            f"[{place.folder.name}]({_relative(place.folder, folder)}/README.md)",
        ]
        for place in joined.places
    ]
    return [
        f"{what[joined.by]} All is in {suite['dtype']}, on windows {window}{last}, of {', '.join(joined.texts)}. "
        f"Methods are fitted on {calibration['text']}, and meet their target as measured on "
        f"{' and '.join(calibration['matching_texts'])}.",
        markdown(lines, heads),
        _intervals(joined),
    ]


def _counts(place: Place) -> str:
    """Windows a text, text by text where they differ."""
    counts = set(place.counts.values())
    return str(*counts) if len(counts) == 1 else ", ".join(f"{n} {text}" for text, n in place.counts.items())


def _intervals(joined: Joined) -> str:
    several = {
        method: [place.seeds.get(method, 0) for place in joined.places]
        for method in joined.methods
        if any(place.seeds.get(method, 0) > 1 for place in joined.places)
    }
    named = ", ".join(f"{method} ({_each(counts)})" for method, counts in several.items())
    seeds = (
        f"Several seeds have {named}; their numbers are means over seeds, and their intervals are over windows and "
        "seeds: to windows that are resampled an error of the mean over seeds is added, which follows Student's t."
        if named
        else "No method has several seeds: the spread between trainings is in no interval."
    )
    first, last = ENDS[joined.by]
    return (
        "Brackets hold 95 % intervals. Losses and shares are means over texts, paired with the dense model window by "
        f"window. {seeds} Changes from the {first} to the {last} take both as independent, and make their interval of "
        "both (MOVER); *goes both ways* says that one step up and one down exclude zero."
    )


def _each(counts: Sequence[int]) -> str:
    known = [count for count in counts if count]
    return str(known[0]) if len(set(known)) == 1 else f"{', '.join(map(str, counts))} by column"


def _losses(joined: Joined, folder: Path) -> list[Part]:
    parts: list[Part] = [*_picture(joined, "losses", joined.methods, TITLES[joined.by], folder), "## Losses"]
    about = "Nats a token above the dense model. **Bold**: the smallest of its column; ≈: within noise of it (paired)."
    found = [one for m in joined.methods for t in joined.targets for one in _numbers(joined, "losses", m, t)]
    if any(one is not None and one.why.startswith("measured") for one in found):
        about += (
            " What says *measured* left other bytes unread than it should, on one text at least: it is held against "
            "no other, has no change, and is not drawn."
        )
    return parts + _tables(joined, "losses", joined.methods, about)


def _shares(joined: Joined, folder: Path) -> list[Part]:
    """Compare shares of the reference's loss: all in tables, those of what is put over it in a picture."""
    reference = joined.reference
    methods = [method for method in joined.methods if any(method in place.shares.index for place in joined.places)]
    if reference is None or not methods:
        return []
    parts: list[Part] = [f"## Share of the loss of {reference} that is won back"]
    over = [method for method in methods if "(" in method and innermost(method) == reference]
    parts += _picture(joined, "shares", over, f"Share of the loss of {reference} that is won back", folder)
    about = f"1 less the loss of a method over that of {reference}, in percent; below 0 it loses more than {reference}."
    return parts + _tables(joined, "shares", over or methods, about)


def _picture(joined: Joined, what: What, methods: Sequence[str], title: str, folder: Path) -> list[Part]:
    """Draw losses, or shares in percent, without what is held against no other; nothing where nothing is left."""
    values: dict[float, dict[str, list[Ends | None]]] = {}
    for target in joined.targets:
        for method in methods:
            found = _numbers(joined, what, method, target)
            ends = [None if one is None or one.why else one.ends for one in found]
            if any(end is not None for end in ends):
                values.setdefault(target, {})[method] = ends
    label = f"share of the loss of {joined.reference} (%)" if what == "shares" else "nats a token above dense"
    x = [(joined.x(place), joined.tick(place)) for place in joined.places]
    most = math.inf if what == "shares" else BROKEN
    if not values:
        return []
    chart = plots.chart(values, x, X_LABELS[joined.by], label, f"{title}, {joined.suite['dtype']}", most)
    return [f"![{title}]({draw.write(chart, folder, what)})"]


def _tables(joined: Joined, what: What, methods: Sequence[str], about: str) -> list[Part]:
    """One table a target at which something has a number; the first has `about` over it."""
    found = [table for target in joined.targets if (table := _table(joined, what, methods, target)).rows]
    return [replace(table, caption=about if number == 0 else "") for number, table in enumerate(found)]


def _table(joined: Joined, what: What, methods: Sequence[str], target: float) -> Table:
    """One row a method, one column a model or length, and how the number changes from the first to the last."""
    first, last = ENDS[joined.by]
    lines = []
    for method in methods:
        found = _numbers(joined, what, method, target)
        if any(one is not None for one in found):
            lines.append([method, *("-" if one is None else one.shown for one in found), changed(found)])
    heads = [f"at {shown_target(target)}", *(map(joined.name, joined.places)), f"{last} less {first}"]
    title = f"{what.capitalize()} at {shown_target(target)}"
    return Table(title, "", heads, lines)


def _numbers(joined: Joined, what: What, method: str, target: float) -> list[Number | None]:
    return [number(place, what, method, target, joined.reference) for place in joined.places]


def _rows(joined: Joined) -> pd.DataFrame:
    """All numbers, one row per model, length, method and target."""
    rows = []
    for place in joined.places:
        for method in place.losses.index:
            for target in place.losses.columns:
                loss, share = (number(place, what, method, target, joined.reference) for what in KINDS)
                if loss is None:
                    continue
                row = [place.model, place.size, place.length, method, target, place.seeds.get(method), *loss.ends]
                shares = [None] * 3 if share is None else [end / 100 for end in share.ends]
                rows.append([*row, *shares, loss.why or (share.why if share is not None else "")])
    numbers = ["loss", "loss_low", "loss_high", "share", "share_low", "share_high", "reason"]
    columns = ["model", "weights_in_blocks", "window", "method", "target", "seeds", *numbers]
    return pd.DataFrame(rows, columns=columns)
