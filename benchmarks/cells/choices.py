"""Changes a suite by what the command line puts in place of its choices: methods, targets, seeds, windows, texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resting.benchmarks.assets import texts
from resting.benchmarks.cells import registry, text_names
from resting.benchmarks.cells.suite import MethodConfig, Source, Suite
from resting.benchmarks.cells.suite_file import available, explained
from resting.benchmarks.documents import spec
from resting.benchmarks.errors import AssetError, SuiteError

DIGITS = 6
"""Of the hash of all choices, in the name of a changed suite."""


@dataclass(frozen=True)
class Choices:
    """Holds what replaces a suite's own choices; None, or nothing, leaves them as they are.

    Attributes
    ----------
    methods : list of str, optional
        Names or labels of the suite's methods, whose settings are kept, or of any other; a wrapper alone wraps teal.
    targets : list of float, optional
        Of all methods; further token policies keep those of theirs that are among them.
    seeds : list of int, optional
    windows, window : int, optional
        Of evaluation: how many, and of how many tokens.
    texts : list of str, optional
        To evaluate on, as a suite names them.
    calibration : str, optional
        To fit on.
    weights : list of str, optional
        Formats that block linears are stored in.
    files : mapping of str to str
        Texts of the user's own by name (``--text NAME=FILE``); what the suite does not name is evaluated on as well.
    name : str, optional
        Of the changed suite and its folder; else the suite's with a hash of the choices.
    """

    methods: list[str] | None = None
    targets: list[float] | None = None
    seeds: list[int] | None = None
    windows: int | None = None
    window: int | None = None
    texts: list[str] | None = None
    calibration: str | None = None
    weights: list[str] | None = None
    files: Mapping[str, str] | None = None
    name: str | None = None

    @property
    def made(self) -> dict[str, Any]:
        """What was chosen, by the name of the choice."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "files")}
        return {name: value for name, value in values.items() if value is not None}


def changed(suite: Suite, choices: Choices) -> Suite:
    """Return `suite` with other choices, under a name of its own; as it is where nothing is chosen.

    The results folder is named after the suite, so those of the suite as it stands are not overwritten: the same
    choices always come to the same folder, and a run that was stopped goes on there.

    Raises
    ------
    SuiteError
        If a choice is not allowed, or has no meaning for a suite of times; the message names it.
    """
    files = {name: file for name, file in (choices.files or {}).items() if name not in suite.sources}
    added = {name: file for name, file in files.items() if name not in texts.CORPORA}
    if not choices.made and not added:
        if choices.name is not None:
            raise SuiteError(f"--name {choices.name}: nothing of suite {suite.name} is changed, and it keeps its name")
        return suite
    _check_kind(suite, choices, added)
    content = suite.model_dump(exclude={"sources"})
    sources: dict[str, Any] = dict(suite.sources)
    for name, where in added.items():
        sources[name] = _here(where)
    _choose_texts(content, sources, choices, added)
    for key in ("windows", "window"):
        if (value := getattr(choices, key)) is not None:
            content["evaluation"][key] = value
    for key in ("seeds", "weights"):
        if (value := getattr(choices, key)) is not None:
            content[key] = value
    if choices.methods is not None:
        content["methods"] = [one.model_dump() for one in _methods(suite, choices.methods)]
    names = [method["name"] for method in content["methods"]]
    for method in content["methods"]:
        method["targets"] = None if choices.targets is not None else method["targets"]
        method["seeds"] = None if choices.seeds is not None else method["seeds"]
    if choices.targets is not None:
        content["targets"] = choices.targets
    content["policies"] = _policies(content["policies"], choices, names)
    if content["reference"] not in [MethodConfig(**method).shown for method in content["methods"]]:
        content["reference"] = None
    made = choices.made | ({"text": sorted(added)} if added else {})
    digits = hashlib.sha256(json.dumps([made, added], sort_keys=True).encode()).hexdigest()[:DIGITS]
    content["name"] = choices.name or f"{suite.name}-changed-{digits}"
    content["title"] = f"{suite.title}, changed"
    said = "; ".join(f"{key}: {_shown(value)}" for key, value in made.items())
    content["description"] = f"{suite.description.rstrip()}\n\nChanged on the command line: {said}.".lstrip()
    content["changed"] = {"suite": suite.name, "choices": made}
    if choices.name == suite.name:
        raise SuiteError(f"--name {choices.name}: that is the suite as it stands; allowed: another name")
    if choices.name in available():
        raise SuiteError(
            f"--name {choices.name}: a suite of this project is called so, and has that results folder; allowed: "
            "another name"
        )
    try:
        return Suite.model_validate(content | {"sources": sources})
    except ValidationError as error:
        raise SuiteError("; ".join(explained(e) for e in error.errors())) from None


def _check_kind(suite: Suite, choices: Choices, added: Mapping[str, str]) -> None:
    if suite.latency is None:
        return
    for key in (*choices.made, *(f"text {name}" for name in added)):
        if key not in ("methods", "targets"):
            raise SuiteError(f"--{key}: suite {suite.name} measures time, on no text; allowed: --methods, --targets")


def _choose_texts(content: dict[str, Any], sources: dict[str, Any], choices: Choices, added: Mapping[str, str]) -> None:
    """Put the chosen texts in their places; files that have none are evaluated on after the others."""
    if choices.texts is not None:
        content["evaluation"]["texts"] = [_name(one, sources) for one in choices.texts]
    if choices.calibration is not None:
        content["calibration"]["text"] = _name(choices.calibration, sources)
        for method in content["methods"]:
            method["text"] = None
    fitted = [content["calibration"]["text"], *content["calibration"]["matching_texts"]]
    named = [*content["evaluation"]["texts"], *fitted, *(method["text"] for method in content["methods"])]
    content["evaluation"]["texts"] = [*content["evaluation"]["texts"], *(name for name in added if name not in named)]


def _name(text: str, sources: dict[str, Any]) -> str:
    """Name of a text; one of the user's own is added to `sources`."""
    if text in texts.CORPORA or text in sources or not spec.is_own(text):
        return text
    try:
        name, where = spec.named(text)
    except AssetError as error:
        raise SuiteError(str(error)) from error
    try:
        text_names.add(sources, name, where, _here(where))
    except ValueError as error:
        raise SuiteError(str(error)) from error
    return name


def _here(where: str) -> Source:
    """A text whose path is relative to the present folder, wherever the suite's file lies."""
    found = Source(where=where)
    found.lie_in(Path.cwd())
    return found


def _methods(suite: Suite, names: Sequence[str]) -> list[MethodConfig]:
    """The suite's own entries of these names or labels, else new ones; the dense model comes first, as in the suite."""
    found: list[MethodConfig] = [one for one in suite.methods if one.name == "dense"]
    for name in names:
        full = registry.completed(name)
        mine = [one for one in suite.methods if name in (one.label, one.shown, one.name) or one.name == full]
        found += [one for one in mine or [MethodConfig(name=full)] if one not in found]
    return found


def _policies(tables: list[dict[str, Any]], choices: Choices, names: Sequence[str]) -> list[dict[str, Any]]:
    """Further token policies with those of their targets and methods that are left; without those that have none."""
    kept = []
    for table in tables:
        targets = [t for t in table["targets"] if choices.targets is None or t in choices.targets]
        methods = table["methods"] and [name for name in table["methods"] if name in names]
        if targets and methods != []:
            kept.append(table | {"targets": targets, "methods": methods})
    return kept


def _shown(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
