"""Names the texts of a suite: the known ones, and those of the user's own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from resting.benchmarks.assets import texts
from resting.benchmarks.documents import spec
from resting.benchmarks.errors import AssetError


def with_names(values: Any) -> Any:
    """Put names in the place of files and data sets in the raw content of a suite; `sources` then says what they are.

    Raises
    ------
    ValueError
        If a name will not do, or two texts have the same; the message names both.
    """
    if not isinstance(values, Mapping):
        return values
    content, given = dict(values), values.get("sources", {})
    if not isinstance(given, Mapping):
        return values
    sources: dict[str, Any] = {k: {"where": v} if isinstance(v, str) else v for k, v in given.items()}
    for table, key in (("evaluation", "texts"), ("calibration", "text"), ("calibration", "matching_texts")):
        if isinstance(section := content.get(table), Mapping) and key in section:
            content[table] = {**section, key: _named(section[key], sources)}
    if isinstance(methods := content.get("methods"), list):
        content["methods"] = [
            {**one, "text": _named(one["text"], sources)} if isinstance(one, Mapping) and "text" in one else one
            for one in methods
        ]
    return content | {"sources": sources} if sources else content


def _named(value: Any, sources: dict[str, Any]) -> Any:
    if isinstance(value, list):
        return [_named(one, sources) for one in value]
    if not isinstance(value, str) or value in texts.CORPORA or value in sources or not spec.is_own(value):
        return value
    try:
        name, where = spec.named(value)
    except AssetError as error:
        raise ValueError(str(error)) from error
    add(sources, name, where, {"where": where})
    return name


def add(sources: dict[str, Any], name: str, where: str, source: Any) -> None:
    """Add a text of the user's own to those that there are.

    Raises
    ------
    ValueError
        If another one has this name.
    """
    there = sources.setdefault(name, source)
    known = there.get("where") if isinstance(there, Mapping) else getattr(there, "where", None)
    if known != where:
        raise ValueError(
            f"two texts are called {name!r}, {known} and {where}: give one of them another name, NAME={where}"
        )


def check_names(sources: Iterable[str], tasks: Sequence[str] = ()) -> None:
    """Refuse names that rows cannot tell from another text's or task's.

    Raises
    ------
    ValueError
    """
    taken = {spec.alike(name): f"a text that the suite knows, {name}" for name in texts.CORPORA}
    taken |= {spec.alike(name): f"a task of the suite, {name}" for name in tasks}
    for name in sources:
        try:
            spec.check_name(name)
        except AssetError as error:
            raise ValueError(str(error)) from error
        if other := taken.get(spec.alike(name)):
            raise ValueError(f"the text {name!r} is called like {other}; allowed: another name, as NAME=FILE")
        taken[spec.alike(name)] = f"another text, {name}"


def check_known(key: str, names: Sequence[str], split: str, own: Iterable[str], splits: Sequence[str] = ()) -> None:
    """Refuse names of no text, and of texts that are not for `split`.

    Parameters
    ----------
    key : str
        Of the suite, for the message.
    names : sequence of str
    split : {"calibration", "evaluation"}
    own : iterable of str
        Names of the user's own texts.
    splits : sequence of str
        Only texts that have all of these.

    Raises
    ------
    ValueError
    """
    allowed = [n for n, c in texts.CORPORA.items() if split in c.splits and set(splits) <= set(c.splits)]
    for name in names:
        if name in allowed or name in own:
            continue
        near = difflib.get_close_matches(name, [*allowed, *own], 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        use = "fit on" if split == "calibration" else "measure on"
        kind = f"no text to {use}" if name in texts.CORPORA else "no known text"
        raise ValueError(f"{key}: {name!r} is {kind}{hint}; allowed: {', '.join([*allowed, *own])}, {spec.FORMS}")
