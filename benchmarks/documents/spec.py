"""Reads how a text of the user's own is written in a suite or on the command line, and gives it a name."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path, PurePath

from resting.benchmarks.documents import files, hub, rows
from resting.benchmarks.errors import AssetError

TEXT = (".txt", ".md", ".text")
"""Endings of files of text that need no name of their own: ``mine.txt`` is called ``mine``."""
ENDINGS = (*TEXT, *rows.TABLES)
LONGEST = 60
"""Characters of a name: it stands in columns, file names and headings."""
NAME = re.compile(r"[\w.+-]+")
FORMS = "a file (mine.txt, data.jsonl:field), hub:organisation/name:config:split:field, or NAME=one of these"
"""What may stand where the name of a text may."""


def is_own(text: str) -> bool:
    """Tell whether `text` says where documents lie, and is not the mere name of a text."""
    path, _ = files.parted(text)
    return text.startswith(hub.PREFIX) or "=" in text or rows.has_fields(path) or path.lower().endswith(TEXT)


def named(text: str) -> tuple[str, str]:
    """Split ``NAME=WHERE``; without a name, that of the file or of the data set is taken.

    Returns
    -------
    str
        The name that rows give the text.
    str
        Where its documents lie.

    Raises
    ------
    AssetError
        If the name will not do, or nothing is named.
    """
    name, equals, where = text.partition("=")
    if not equals or text.startswith(hub.PREFIX):
        return check_name(derived(text)), text
    if not where:
        raise AssetError(f"text {text!r} names no file; allowed: {FORMS}")
    return check_name(unicodedata.normalize("NFC", name.strip())), where


def derived(where: str) -> str:
    """Name a text after its file without the ending, or after its data set; other signs become hyphens."""
    if where.startswith(hub.PREFIX):
        name = hub.parse(where).repository.split("/")[-1]
    else:
        name = PurePath(files.parted(where)[0]).name
        ending = next((e for e in sorted(ENDINGS, key=len, reverse=True) if name.lower().endswith(e)), "")
        name = name[: len(name) - len(ending)] if ending else PurePath(name).stem
    return re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", name)).strip("-")


def check_name(name: str) -> str:
    """Return a name that columns and files can bear.

    Raises
    ------
    AssetError
    """
    if not NAME.fullmatch(name) or len(name) > LONGEST or name.strip(".") == "":
        raise AssetError(
            f"{name[:80]!r} cannot be the name of a text; allowed: up to {LONGEST} letters, digits, '_', '-', '+' and "
            "'.'; a file gets another name as NAME=FILE"
        )
    return name


def alike(name: str) -> str:
    """Return what two names have in common that a reader takes for the same one."""
    return unicodedata.normalize("NFKC", name).casefold()


def read(where: str, folder: Path | None = None) -> tuple[str, str, list[str]]:
    """Read the documents of a text.

    Parameters
    ----------
    where : str
        Without a name. Paths are relative to `folder`, or to the present one.
    folder : Path, optional

    Returns
    -------
    str
        Where they lie, with the commit of a data set of the hub.
    str
        For people: where they are from.
    list of str
        Each once, and none that is blank.

    Raises
    ------
    AssetError
    """
    if where.startswith(hub.PREFIX):
        found, shown, documents = hub.documents(where)
        return str(found), shown, documents
    location, field = files.parted(where)
    path = Path(location)
    if folder is not None and not path.is_absolute() and not location.startswith("~"):
        path = folder / path
    return where, path.name, files.documents(path, field)
