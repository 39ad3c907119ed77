"""Reads the documents of a data set on the Hugging Face hub: those of its first file of text."""

from __future__ import annotations

import gzip
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path

from resting.benchmarks.errors import AssetError, first_line

COUNT = 4000
"""Documents read, from the first on."""
COLUMNS = ("text", "content", "document", "story")
"""Columns that are taken where none is named, the first that is there."""
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json.gz", ".txt")
ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<column>[\w.-]+))?", re.ASCII)


def is_id(text: str) -> bool:
    """Tell whether `text` is ``organisation/name``, perhaps with ``:column``, and no path of this machine."""
    return ID.fullmatch(text) is not None and text[0] != "." and not Path(text).exists()


def documents(spec: str) -> tuple[str, list[str]]:
    """Read the first documents of a data set.

    Parameters
    ----------
    spec : str
        ``organisation/name``, or ``organisation/name:column``.

    Returns
    -------
    str
        The data set with its revision and file, which say again what was read.
    list of str
        Blank ones left out.

    Raises
    ------
    AssetError
        If the hub has no such data set or cannot be reached, or if no text is found in it.
    """
    found = ID.fullmatch(spec)
    assert found is not None
    repository, column = found["repository"], found["column"]
    try:
        revision, name, path = _fetch(repository)
        texts = list(itertools.islice(_read(path, column), COUNT))
    except AssetError:
        raise
    except Exception as error:
        raise AssetError(
            f"no text of that name or file {spec}, and no data set from the hub: {first_line(error)}"
        ) from error
    kept = [text for text in texts if text.strip()]
    if not kept:
        raise AssetError(f"the data set {repository} has no text in {name}")
    return f"{repository}@{revision[:12]}/{name}", kept


def _fetch(repository: str) -> tuple[str, str, Path]:
    """Download the first file of text, one for training where there is one."""
    from huggingface_hub import HfApi, hf_hub_download

    info = HfApi().dataset_info(repository)
    names = sorted(file.rfilename for file in info.siblings or [] if file.rfilename.endswith(ENDINGS))
    names = [name for name in names if "train" in name] or names
    if not names:
        raise AssetError(f"the data set {repository} has no file that ends with {', '.join(ENDINGS)}")
    path = hf_hub_download(repository, names[0], repo_type="dataset", revision=info.sha)
    return str(info.sha), names[0], Path(path)


def _read(path: Path, column: str | None) -> Iterator[str]:
    if path.name.endswith(".txt"):
        yield from path.read_text(encoding="utf-8").split("\n\n")
        return
    if not path.name.endswith(".parquet"):
        with (gzip.open if path.name.endswith(".gz") else open)(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield str(row[_column(list(row), column)] or "")
        return
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    chosen = _column(file.schema_arrow.names, column)
    for batch in file.iter_batches(columns=[chosen]):
        yield from (str(text or "") for text in batch.column(chosen).to_pylist())


def _column(names: list[str], asked: str | None) -> str:
    """Choose the column of the text."""
    found = next((name for name in ([asked] if asked else COLUMNS) if name in names), None)
    if found is None:
        shown = f"no column {asked!r}" if asked else f"no column {' or '.join(COLUMNS)}"
        raise AssetError(f"the data set has {shown}; allowed after a colon: {', '.join(names)}")
    return found
