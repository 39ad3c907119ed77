"""Reads the texts that published methods were calibrated on, from the Hugging Face hub."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resting.benchmarks.assets import wikitext2
from resting.benchmarks.errors import AssetError


@dataclass(frozen=True)
class HubText:
    """Names the first file of a data set on the hub, at one revision.

    Attributes
    ----------
    repository, revision, pattern, column : str
    count : int
        Documents read, from the first on: enough for every published calibration.
    about : str
    """

    repository: str
    revision: str
    pattern: str
    column: str
    count: int
    about: str


TEXTS = {
    "alpaca": HubText(
        "tatsu-lab/alpaca",
        "dce01c9b08f87459cf36a430d809084718273017",
        "data/train-00000-of-*.parquet",
        "text",
        300,
        "first 300 samples of Alpaca (TEAL)",
    ),
    "refinedweb": HubText(
        "tiiuae/falcon-refinedweb",
        "c735840575b629292b41da8dde11dcd523d4f91c",
        "data/train-00000-of-*.parquet",
        "content",
        2000,
        "first 2,000 documents of RefinedWeb (CATS)",
    ),
    "c4": HubText(
        "allenai/c4",
        "1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        "en/c4-train.00000-of-01024.json.gz",
        "text",
        4000,
        "first 4,000 documents of C4 (CHESS)",
    ),
    "wikitext2-train": HubText(
        "Salesforce/wikitext",
        wikitext2.REVISION,
        "wikitext-2-raw-v1/train-*.parquet",
        "text",
        4000,
        "first 4,000 lines of the training split of WikiText-2 (R-Sparse)",
    ),
}


def documents(name: str) -> list[str]:
    """Read the documents of `name`, without blank ones.

    Raises
    ------
    AssetError
        If the hub cannot be reached, or the file is not what it was.
    """
    text = TEXTS[name]
    try:
        path = _file(text)
        found = [
            str(d) for d in itertools.islice(_read(path, text.column), text.count) if d is not None and str(d).strip()
        ]
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AssetError(f"{name} ({text.repository} on the hub) cannot be had: {first}") from error
    if not found:
        raise AssetError(f"{name}: {path} holds no text in column {text.column!r}")
    return found


def is_cached(name: str) -> bool:
    try:
        return _file(TEXTS[name], local_files_only=True).is_file()
    except Exception:
        return False


def _file(text: HubText, local_files_only: bool = False) -> Path:
    from huggingface_hub import snapshot_download

    folder = snapshot_download(
        text.repository,
        repo_type="dataset",
        revision=text.revision,
        allow_patterns=[text.pattern],
        local_files_only=local_files_only,
    )
    files = sorted(Path(folder).glob(text.pattern))
    if not files:
        raise FileNotFoundError(f"no file {text.pattern} in it")
    return files[0]


def _read(path: Path, column: str) -> Iterator[str]:
    if path.name.endswith(".json.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            for line in lines:
                yield json.loads(line)[column]
        return
    import pyarrow.parquet

    for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=[column]):
        yield from batch.column(column).to_pylist()
