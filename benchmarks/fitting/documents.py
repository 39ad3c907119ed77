"""Reads the documents that a method is fitted on, and those that it is measured on and never sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resting.benchmarks.assets import texts
from resting.benchmarks.errors import AssetError, FitError, first_line
from resting.benchmarks.fitting import hub_data

OWN = "own text"
"""Name of a text that is given as a list."""
LONG = 40
"""Characters from which on a line that two texts share is no accident."""
SHARED = 0.1
"""Share of a held-out text's long lines that may stand in the calibration text as well."""

Given = str | Path | Sequence[str]
"""A name of `texts.CORPORA`, the path of a UTF-8 file, a data set on the hub (`hub_data`), or documents."""


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
    if isinstance(text, str) and hub_data.is_id(text):
        name, documents = hub_data.documents(text)
    elif isinstance(text, str | Path):
        name, documents = Path(text).name, [_file(text, split)]
    elif isinstance(text, Sequence) and all(isinstance(part, str) for part in text):
        name, documents = OWN, list(text)
    else:
        raise FitError(f"a text must be a name, the path of a file or a list of str, got {type(text).__name__}")
    found = [document for document in dict.fromkeys(documents) if document.strip()]
    if not found:
        raise FitError(f"{name} holds no text")
    return name, found


def _file(text: str | Path, split: str) -> str:
    try:
        path = Path(text).expanduser()
        if isinstance(text, str) and not path.exists():
            names = [name for name, corpus in texts.CORPORA.items() if split in corpus.splits]
            shown = text if len(text) <= 80 else f"{text[:80]}..."
            raise AssetError(
                f"there is no text {shown!r}; allowed: {', '.join(names)}, the path of a UTF-8 file, or "
                "organisation/name of a data set on the hub (text itself is given as a list of str)"
            )
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise AssetError(f"the text file {text} cannot be read: it is not UTF-8 text") from error
    except OSError as error:
        raise AssetError(f"the text file {str(text)[:80]} cannot be read: {error.strerror}") from error
    except (RuntimeError, ValueError) as error:  # there is no such user; a name with a null
        raise AssetError(f"the text file {text!r} cannot be read: {first_line(error)}") from error


def _check_apart(name: str, fitted: list[str], other: str, held_out: list[str]) -> None:
    """Refuse to measure on what was fitted on: long lines tell, since documents are cut at different places."""
    seen = {line.strip() for document in fitted for line in document.splitlines()}
    lines = [line.strip() for document in held_out for line in document.splitlines() if len(line.strip()) >= LONG]
    shared = sum(len(line) for line in lines if line in seen)
    whole = sum(len(line) for line in lines)
    same = set(fitted) & set(held_out)
    if same or shared > SHARED * whole:
        share = "a document" if same else f"{shared / whole:.0%}"
        raise FitError(
            f"{share} of the held-out text {other} stands in {name}, which is fitted on; allowed: other text"
        )
