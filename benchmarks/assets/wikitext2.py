"""Reads WikiText-2 (raw, test split) from the hub or a given file, verifies it, and keeps it in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from resting.benchmarks import cache
from resting.benchmarks.assets import wheels
from resting.benchmarks.documents import files as document_files
from resting.benchmarks.errors import AssetError

SHA256 = "bbf94c53a05abe9ee670d3b6343608095822c85e26de37c70b24fc571964574a"
"""Of the test split with Unix line ends and without blank lines, however it was had."""
REVISION = "b08601e04326c79dfdd32d625aee71d232d685c3"
"""Of ``Salesforce/wikitext`` on the hub."""


def documents() -> list[str]:
    """Read the split, as one document.

    Raises
    ------
    AssetError
        If it is not in the cache as its hash says, and cannot be had from the hub.
    """
    local = path()
    if not wheels.is_intact(local, SHA256):
        keep(from_hub(), "the hub's Salesforce/wikitext")
    return [local.read_text(encoding="utf-8")]


def provide(files: Mapping[str, str]) -> None:
    """Take texts from local files (``--text wikitext2=FILE``); they are verified and kept in the cache."""
    for name, file in files.items():
        if name != "wikitext2":
            raise AssetError(f"--text {name}={file}: allowed here is wikitext2=FILE")
        keep(document_files.whole(Path(file)), file)


def path() -> Path:
    """Return where the cache has it."""
    return cache.root() / "texts" / "wikitext-2-raw-test.txt"


def keep(text: str, source: str) -> None:
    """Write `text` into the cache without blank lines, if that is the test split.

    Raises
    ------
    AssetError
        If its hash is another one; the message names `source` and both hashes.
    """
    lines = [line for line in text.split("\n") if line.strip()]
    normal = "\n".join(lines) + "\n"
    actual = hashlib.sha256(normal.encode()).hexdigest()
    if actual != SHA256:
        raise AssetError(
            f"{source} is not the WikiText-2 raw test split: without blank lines it has sha256 {actual}, "
            f"expected {SHA256}"
        )
    cache.write_whole(path(), normal)


def from_hub() -> str:
    """Download the split from the hub, at a pinned revision.

    Raises
    ------
    AssetError
        If the hub cannot be reached.
    """
    import pyarrow.parquet
    from huggingface_hub import hf_hub_download

    try:
        file = hf_hub_download(
            "Salesforce/wikitext",
            "wikitext-2-raw-v1/test-00000-of-00001.parquet",
            repo_type="dataset",
            revision=REVISION,
        )
    except Exception as error:
        local = path()
        kept = f"not what its hash says in the cache ({local})" if local.exists() else "neither in the cache"
        raise AssetError(
            f"wikitext2 is {kept} nor to be had from the hub: give it with --text wikitext2=FILE"
        ) from error
    return "".join(pyarrow.parquet.read_table(file).column("text").to_pylist())
