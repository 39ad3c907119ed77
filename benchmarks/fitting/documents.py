"""Reads the documents that a method is fitted on, and those that it is measured on and never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resting.benchmarks.assets import texts
from resting.benchmarks.documents import files, hub, overlap, rows
from resting.benchmarks.errors import AssetError, FitError

OWN = "own text"
"""Name of a text that is given as a list."""
Given = str | Path | Sequence[str]
"""A name of `texts.CORPORA`, the path of a file (`files`), a data set on the hub (`hub`), or documents."""


@dataclass(frozen=True)
class Text:
    """Holds the documents of a text, those to fit on apart from those to measure on.

    Attributes
    ----------
    name : str
        Of a file without its folder.
    documents : list of str
        To fit on.
    held_out : list of str or None
        To measure on; None where the last part of `documents` is to be kept off.
    held_out_name : str
    """

    name: str
    documents: list[str]
    held_out: list[str] | None
    held_out_name: str


def read(text: Given, held_out: Given | None = None) -> Text:
    """Read a text, and what is held out of it.

    A known text has documents for calibration and for evaluation, which a hash of each tells apart. Of a file, a list,
    or a text that is known for calibration only, the last part will be held out (`material.of`), unless `held_out`
    names another text.

    Raises
    ------
    AssetError, FitError
        If a text cannot be read, is empty, or both are the same.
    """
    known = isinstance(text, str) and text in texts.CORPORA
    name, documents = _read(text, "calibration")
    if held_out is not None:
        other, kept = _read(held_out, "evaluation")
        _check_apart(name, documents, other, kept)
        return Text(name, documents, kept, other)
    if known and "evaluation" in texts.CORPORA[str(text)].splits:
        return Text(name, documents, texts.documents(str(text), "evaluation"), name)
    return Text(name, documents, None, name)


def _read(text: Given, split: str) -> tuple[str, list[str]]:
    """Name and documents, each once."""
    if isinstance(text, str) and text in texts.CORPORA:
        try:
            return text, texts.documents(text, split)
        except AssetError as error:
            if text == "wikitext2" and split == "evaluation":  # its own words are of another option
                raise AssetError(
                    "wikitext2 is neither in the cache nor to be had from the hub: give the path of its file"
                ) from error
            raise
    if isinstance(text, str) and text.startswith(hub.PREFIX):
        _, name, found = hub.documents(text)
        return name, found
    if isinstance(text, str) and hub.is_id(text):
        try:
            _, name, found = hub.documents(text)
        except AssetError as error:
            raise AssetError(f"there is no text or file {text}, and of the hub: {error}") from error
        return name, found
    if isinstance(text, str | Path):
        return _file(text, split)
    if isinstance(text, Sequence) and all(isinstance(part, str) for part in text):
        return OWN, files.distinct(text, OWN)
    raise FitError(f"a text must be a name, the path of a file or a list of str, got {type(text).__name__}")


def _file(text: str | Path, split: str) -> tuple[str, list[str]]:
    """Name and documents of a file; text is one document, whose last part can be held out."""
    location, field = files.parted(str(text))
    path = Path(location)
    if isinstance(text, str) and not _exists(path):
        names = [name for name, corpus in texts.CORPORA.items() if split in corpus.splits]
        shown = text if len(text) <= 80 else f"{text[:80]}..."
        raise AssetError(
            f"there is no text {shown!r}; allowed: {', '.join(names)}, the path of a UTF-8 file, FILE.jsonl:FIELD, or "
            "organisation/name of a data set on the hub (text itself is given as a list of str)"
        )
    if rows.has_fields(location):
        return path.name, files.documents(path, field)
    return path.name, files.distinct([files.whole(path)], path.name)


def _exists(path: Path) -> bool:
    try:
        return path.expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # what is wrong with it, reading it says
        return True


def _check_apart(name: str, fitted: list[str], other: str, held_out: list[str]) -> None:
    """Refuse to measure on what was fitted on."""
    if share := overlap.shared(fitted, held_out):
        raise FitError(
            f"{share} of the held-out text {other} stands in {name}, which is fitted on; allowed: other text"
        )
