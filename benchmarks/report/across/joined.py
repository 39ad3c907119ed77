"""Reads several results folders, and orders what they hold by the size of models or by the length of windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from resting.benchmarks.cells.ranking import unranked
from resting.benchmarks.cells.suite import Tokens
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.names import short
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report.across import protocol
from resting.benchmarks.report.compared import jitter
from resting.sparsifier.quantised.formats import AS_IS

By = Literal["size", "length"]


@dataclass(frozen=True)
class Place:
    """Holds what one model lost on windows of one length.

    Attributes
    ----------
    folder : Path
        Where the numbers are from.
    model, sha256 : str
    size : int or None
        Weights in the matrices of its blocks, all experts counted; None where the folder does not say it.
    length : int
        Tokens of a window.
    counts : dict of str to int
        Windows that were measured, by text.
    begins_with : list of str
        Tokens that every window begins with.
    device : str
        What it was measured on.
    seeds : dict of str to int
        Seeds of every method.
    losses : DataFrame
        `losses.losses`: index method, columns target, values `Loss`.
    shares : DataFrame
        `losses.reference_shares`; empty without a reference.
    """

    folder: Path
    model: str
    sha256: str
    size: int | None
    length: int
    counts: dict[str, int]
    begins_with: list[str]
    device: str
    seeds: dict[str, int]
    losses: pd.DataFrame
    shares: pd.DataFrame


@dataclass(frozen=True)
class Joined:
    """Holds places in the order of what differs.

    Attributes
    ----------
    by : {"size", "length"}
    places : list of Place
    suite : dict
        The suite of the first folder; all have its protocol.
    """

    by: By
    places: list[Place]
    suite: dict[str, Any]

    @property
    def texts(self) -> list[str]:
        """Return the texts that losses are means over."""
        return list(self.suite["evaluation"]["texts"])

    @property
    def reference(self) -> str | None:
        """Return the method that shares are of."""
        return self.suite.get("reference")

    @property
    def targets(self) -> list[float]:
        """Return the targets that at least two places have."""
        every = [target for place in self.places for target in place.losses.columns]
        return sorted(target for target in set(every) if every.count(target) > 1)

    @property
    def methods(self) -> list[str]:
        """Return the methods in the order of the folders."""
        return list(dict.fromkeys(method for place in self.places for method in place.losses.index))

    def x(self, place: Place) -> float:
        """Return where `place` stands: millions of weights, or tokens."""
        return place.length if self.by == "length" else (place.size or 0) / 1e6

    def name(self, place: Place) -> str:
        """Return what a column calls `place`."""
        return f"{place.length:,}" if self.by == "length" else short(place.model)

    def tick(self, place: Place) -> str:
        """Return what a picture calls `place`: a model with its size in a line of its own."""
        return self.name(place) + (f"\n{self.x(place):,.0f} M" if self.by == "size" else "")


def read(paths: Sequence[Path]) -> Joined:
    """Read and check results folders.

    Parameters
    ----------
    paths : sequence of Path
        Folders of one protocol: of several models, or of one model with windows of several lengths.

    Raises
    ------
    BenchmarkError
        If one is damaged or of another protocol, lacks a number that all need, or nothing differs between them.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise BenchmarkError(f"{_listed(paths)} name one folder twice; allowed: each once")
    found = [(path, _facts(path)) for path in paths]
    lengths = {facts["suite"]["evaluation"]["window"] for _, facts in found}
    models = {model["sha256"]: model["name"] for _, facts in found for model in facts["models"]}
    if len(lengths) > 1 and len(models) > 1:
        raise BenchmarkError(
            f"{_listed(paths)} differ in their models ({_listed(map(short, models.values()))}) and in the "
            f"length of windows ({_listed(sorted(lengths))}); allowed: one of both"
        )
    by: By = "length" if len(lengths) > 1 else "size"
    protocol.check(found, [protocol.LENGTH] if by == "length" else [])
    places = [place for path, facts in found for place in _places(path, facts)]
    _check(places, by)
    places.sort(key=lambda place: (place.length, place.size or 0, place.model))
    return Joined(by, places, found[0][1]["suite"])


def _listed(values: Any) -> str:
    return ", ".join(map(str, values))


def _facts(path: Path) -> dict[str, Any]:
    """The provenance.json of a suite of quality that has texts."""
    facts = folders.read_facts(path)
    if facts.keys() != folders.FACTS:
        raise BenchmarkError(f"{path} holds no results of a suite as this version writes them; allowed: such results")
    if not facts["suite"]["evaluation"]["texts"]:
        raise BenchmarkError(f"{path} has losses on no text; allowed: results of a suite with evaluation.texts")
    if stored := {model["stored_as"] for model in facts["models"] if model.get("stored_as", AS_IS) != AS_IS}:
        raise BenchmarkError(f"{path} has weights in {_listed(sorted(stored))}; allowed: weights as they are")
    return facts


def _places(path: Path, facts: dict[str, Any]) -> list[Place]:
    frame, windows = folders.read_results(path), folders.read_singles(path / "windows.parquet")
    with folders.named(path):
        own = str(Tokens(**facts["suite"]["tokens"]).build())
        frame, windows = frame[frame.tokens == own], windows[windows.tokens == own]
        return [
            _place(path, facts, model, frame[frame.model == model["name"]], windows[windows.model == model["name"]])
            for model in facts["models"]
        ]


def _place(
    path: Path, facts: dict[str, Any], model: dict[str, str], frame: pd.DataFrame, windows: pd.DataFrame
) -> Place:
    suite, name = facts["suite"], model["name"]
    texts = suite["evaluation"]["texts"]
    dense = [cell for cell in facts["cells"] if cell["model"] == name and cell["method"] == "dense"]
    known = windows[windows.method == "dense"].groupby("metric").window.nunique()
    for text in texts:
        if f"{text}_nll" not in known:
            raise BenchmarkError(f"{path} has no loss of {name} on {text}; allowed: folders with all of their texts")
    rows = frame[frame.metric.isin([f"{text}_perplexity" for text in texts])]
    scored = int(rows.groupby("dataset").n.max().sum())
    losses = jitter.marked(analysis.losses(windows, texts, unranked(frame[frame.dataset.isin(texts)])), scored)
    if losses.empty:
        raise BenchmarkError(f"{path} has no method beside the dense model; allowed: folders with some")
    reference = suite.get("reference")
    shares = analysis.reference_shares(windows, texts, reference) if reference else pd.DataFrame()
    places = {cell["measured_on"] for cell in facts["cells"] if cell["model"] == name and "measured_on" in cell}
    machines = [facts["machines"][place] for place in sorted(places)]
    devices = dict.fromkeys(one["cpu"] if one["device"] == "cpu" else one["device"] for one in machines)
    return Place(
        path,
        name,
        model["sha256"],
        next((cell["reads"]["stored"] for cell in dense if "reads" in cell), None),
        suite["evaluation"]["window"],
        {text: int(known[f"{text}_nll"]) for text in texts},
        next((cell["begins_with"] for cell in dense if cell.get("begins_with") is not None), []),
        " and ".join(devices) or "not known",
        {str(method): int(count) for method, count in rows.groupby("method").seed.nunique().items()},
        losses,
        shares,
    )


def _check(places: Sequence[Place], by: By) -> None:
    """Refuse what has no order: one place, the same place twice, a size that is not known."""
    if len(places) < 2:
        raise BenchmarkError(
            f"{places[0].folder} alone: there is nothing to join; allowed: two or more folders, of several models or "
            "with windows of several lengths"
        )
    seen: dict[tuple[str, int], Place] = {}
    for place in places:
        if (same := seen.setdefault((place.sha256, place.length), place)) is not place:
            raise BenchmarkError(
                f"{same.folder} and {place.folder} hold the same model ({short(place.model)}) on windows of "
                f"{place.length} tokens; allowed: each once"
            )
        if by == "size" and place.size is None:
            raise BenchmarkError(
                f"{place.folder} does not say how many weights {short(place.model)} has: it was measured by an older "
                "version; allowed: folders that this version measured"
            )
