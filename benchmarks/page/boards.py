"""Joins the losses of all folders that measured the same thing, and the speeds of the same model, into boards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from resting.benchmarks import labels
from resting.benchmarks.cells.ranking import unranked
from resting.benchmarks.names import RANDOM, of_weights, short
from resting.benchmarks.page.collect import Folder
from resting.benchmarks.quality import intervals
from resting.benchmarks.report import losses
from resting.benchmarks.report.speedups import samples, timed_in

AGREE = 0.01
"""Nats, or share of a loss above one nat, by which folders of one board may differ in what wraps no other method."""


@dataclass
class Part:
    """Holds the losses that one folder has of one model.

    Attributes
    ----------
    key : tuple
        What a loss depends on, but the method: model, weights, dtype, windows, token policy, tokens scored by text.
    points : dict of (str, float) to list
        By method and target: bytes left unread, nats, low, high, seeds.
    """

    folder: int
    key: tuple[Any, ...]
    texts: list[str]
    points: dict[tuple[str, float], list[Any]]

    @property
    def methods(self) -> list[str]:
        """Return its methods, without variants."""
        return list(dict.fromkeys(m for m, _ in self.points if not labels.split(m)[2]))

    def agrees(self, other: Part) -> bool:
        """Say whether what wraps no other method lost the same in both, and there is such a method."""
        plain = [k for k in self.points if k in other.points and not labels.split(k[0])[0]]
        gaps = [abs(self.points[k][1] - other.points[k][1]) / max(1.0, self.points[k][1]) for k in plain]
        return bool(gaps) and max(gaps) <= AGREE


def boards(folders: list[Folder], timed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Make one board per model and texts: what every method loses there, from whichever folders hold it.

    Folders are joined where model, weights, dtype, windows, token policy and scored tokens are the same, and where the
    methods that both have, and that wrap no other, lose the same (`AGREE`). Of a method in several folders, the one
    with the most points is taken; folders of others come after those of this project.

    Parameters
    ----------
    folders : list of Folder
    timed : list of dict
        What `timings` returned.
    """
    found = [part for place, folder in enumerate(folders) for part in _parts(place, folder)]
    found.sort(
        key=lambda p: (folders[p.folder].name.startswith("community/"), -len(p.points), -len(p.methods), p.folder)
    )
    joined: list[list[Part]] = []
    for part in found:
        home = next((group for group in joined if group[0].key == part.key and group[0].agrees(part)), None)
        if home is None:
            joined.append([part])
        else:
            home.append(part)
    joined.sort(key=lambda group: -len({m for p in group for m in p.methods}) * np.log(1 + group[0].key[-1][0][1]))
    made = [_board(group, folders, timed) for group in joined]
    labels = [board["label"] for board in made]
    for board in made:  # of two that look alike, the folder tells which it is
        if labels.count(board["label"]) > 1:
            board["label"] += f", {folders[board['first']].name}"
    return made


def timings(folders: list[Folder]) -> list[dict[str, Any]]:
    """Make one record per model, dtype and number of threads that was timed.

    A point is method, target, speed over the fastest dense path, its 95 % interval, bytes left unread, the limit that
    bytes set, megabytes a token, tokens a second.
    """
    out = []
    for place, folder in enumerate(folders):
        if folder.decoded is None or "speedup" not in folder.decoded:
            continue
        machine, drawn = folder.machines[0], samples(folder.path)
        done = folder.decoded[folder.decoded.speedup.notna()]
        for (model, dtype, threads), group in done.groupby(["model", "dtype", "threads"], sort=False):
            weights = group.weights.iloc[0] if "weights" in group else None
            if not isinstance(weights, str):  # timed before rows named them
                weights = RANDOM if "(random weights)" in model else None
            points = []
            for row in group.sort_values("target").itertuples():
                sample = drawn.get((model, dtype, int(threads), row.method, float(row.target)))
                ends = (None, None) if sample is None else intervals.ends(sample)
                size = getattr(row, "bytes_per_token", np.nan) / 1e6
                more = [getattr(row, name, np.nan) for name in ("limit", "tokens_per_second")]
                points.append([row.method, row.target, row.speedup, *ends, row.byte_sparsity, more[0], size, more[1]])
            setting = timed_in(dtype, int(threads), machine)
            where = machine.get("cpu", "") if machine.get("device", "cpu") == "cpu" else ""
            out.append(
                {
                    "label": f"{short(model)}, {setting}" + (f" of {where}" if where else ""),
                    "setting": setting + (f" of {where}" if where else ""),
                    "model": model,
                    "weights": weights,
                    "random": weights == RANDOM,
                    "dtype": setting,
                    "folder": place,
                    "points": points,
                }
            )
    return out


def _parts(place: int, folder: Folder) -> list[Part]:
    out: list[Part] = []
    if folder.windows is None or folder.rows.empty:
        return out
    hashes = {
        str(m.get("name")): of_weights(str(m.get("sha256")))
        for m in folder.facts.get("models", [])
        if isinstance(m, dict)
    }
    for model, rows in folder.rows.groupby("model", sort=False):
        rows = rows[rows.metric.str.endswith("_perplexity") & ~rows.metric.str.contains("/") & rows.value.notna()]
        if rows.empty:
            continue
        rows = rows[rows.tokens == rows.tokens.iloc[0]]  # the suite's own policy comes first
        texts = sorted(dict.fromkeys(m.removesuffix("_perplexity") for m in rows.metric))
        windows = folder.windows[(folder.windows.model == model) & (folder.windows.tokens == rows.tokens.iloc[0])]
        if windows.empty:
            continue
        sizes = tuple((t, int(rows[rows.metric == f"{t}_perplexity"].n.max() or 0)) for t in texts)
        weights = rows.weights.dropna().iloc[0] if rows.weights.notna().any() else hashes.get(str(model))
        count = int(windows.groupby("metric").window.nunique().max())
        key = (str(model), weights, str(rows["dtype"].iloc[0]), count, rows.tokens.iloc[0], sizes)
        out_of = unranked(rows.assign(dataset=rows.metric.str.removesuffix("_perplexity")))
        table = losses.losses(windows, texts, out_of)
        points = {}
        for method in table.index:
            for target in table.columns:
                loss = table.loc[method, target]
                if not isinstance(loss, losses.Loss) or loss.unranked or not np.isfinite(loss.value):
                    continue
                of = rows[(rows.method == method) & (rows.target == target)]
                points[str(method), float(target)] = [
                    of.byte_sparsity.mean(),
                    loss.value,
                    loss.low,
                    loss.high,
                    int(of.seed.nunique()),
                ]
        if points:
            out.append(Part(place, key, texts, points))
    return out


def _board(group: list[Part], folders: list[Folder], timed: list[dict[str, Any]]) -> dict[str, Any]:
    model, weights, dtype, _, tokens, sizes = group[0].key
    points: dict[tuple[str, float], list[Any]] = {}
    for part in group:
        mine = set(points)
        methods = {m for m, _ in mine}
        for (method, target), values in part.points.items():
            # One folder's numbers of a method are taken whole: its settings are the same at all targets.
            if method not in methods:
                points[method, target] = [method, target, *values, part.folder]
    scored = sum(n for _, n in sizes)
    texts = group[0].texts
    same = [
        place
        for place, one in enumerate(timed)
        if not one["random"] and (one["weights"] == weights if one["weights"] else one["model"] == model)
    ]
    same.sort(key=lambda place: _in_common(timed[place], points), reverse=True)
    said = f"{len(texts)} texts" if len(texts) > 1 else texts[0]
    return {
        "label": f"{short(model)}, {dtype}, {scored:,} tokens of {said}",
        "model": model,
        "dtype": dtype,
        "tokens": tokens,
        "texts": texts,
        "scored": scored,
        "folders": sorted({values[-1] for values in points.values()}),
        "first": group[0].folder,
        "points": list(points.values()),
        "timed": same,
    }


def _in_common(timed: dict[str, Any], points: dict[tuple[str, float], list[Any]]) -> tuple[int, int]:
    """Count the targets, and the points, that were timed as well: what has most of them is shown first."""
    found = {(method, target) for method, target, *_ in timed["points"]} & set(points)
    return len({target for _, target in found}), len(found)
