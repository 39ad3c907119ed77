"""Reads the documents of a data set on the Hugging Face hub: those of its first file of text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from resting.benchmarks.documents import files, rows
from resting.benchmarks.errors import AssetError, first_line

COUNT = 4000
"""Documents read, from the first on."""
PREFIX = "hub:"
ENDINGS = (".parquet", ".jsonl", ".jsonl.gz", ".json", ".json.gz", ".txt")
NOT_TEXT = ("dataset_infos.json", "dataset_info.json", "state.json", "package.json")
ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?::(?P<field>[\w.-]+))?", re.ASCII)
NAMED = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?(?P<rest>(?::[^:]*){0,3})")


@dataclass(frozen=True)
class DataSet:
    """Names a part of a data set on the hub.

    Attributes
    ----------
    repository : str
    field : str, optional
        The first of `rows.FIELDS` that is there where None.
    split : str, optional
        ``train`` where there is one, else any.
    config : str, optional
    revision : str, optional
        A commit, branch or tag; the newest commit where None.
    """

    repository: str
    field: str | None = None
    split: str | None = None
    config: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        parts = [self.config or "", self.split or "", self.field or ""]
        while parts and not parts[0]:
            parts.pop(0)
        return ":".join([f"{PREFIX}{self.repository}{at}", *parts])


def is_id(text: str) -> bool:
    """Tell whether `text` is ``organisation/name``, perhaps with ``:field``, and no path of this machine."""
    return ID.fullmatch(text) is not None and text[0] != "." and not Path(text).exists()


def parse(text: str) -> DataSet:
    """Read ``hub:organisation/name:config:split:field``; parts that are left out are the first ones.

    So ``hub:organisation/name:field`` and ``hub:organisation/name:split:field`` will do. A revision stands behind the
    name: ``hub:organisation/name@v1.0:field``.

    Raises
    ------
    AssetError
    """
    found = NAMED.fullmatch(text.removeprefix(PREFIX))
    if found is None:
        raise AssetError(
            f"{text!r} names no data set; allowed: {PREFIX}organisation/name, with :field, :split:field or "
            ":config:split:field after it"
        )
    parts = found["rest"].split(":")[1:]
    config, split, field = (part or None for part in [*[""] * (3 - len(parts)), *parts])
    return DataSet(found["repository"], field, split, config, found["revision"])


def documents(spec: str) -> tuple[DataSet, str, list[str]]:
    """Read the first documents of a data set.

    Parameters
    ----------
    spec : str
        As `parse` takes it.

    Returns
    -------
    DataSet
        The same with its commit, which is read again whatever is uploaded later.
    str
        The data set with its commit and file, for people.
    list of str
        Each document once, without blank ones.

    Raises
    ------
    AssetError
        If the hub has no such data set or cannot be reached, or if no text is found in it.
    """
    data = parse(spec)
    try:
        revision, name, path = _fetch(data)
        shown = f"{name} of the data set {data.repository}"
        texts = list(itertools.islice(rows.read(path, data.field, shown), COUNT))
    except AssetError:
        raise
    except Exception as error:
        raise AssetError(f"the data set {data.repository} cannot be had from the hub: {first_line(error)}") from error
    found = files.distinct(texts, f"{name} of the data set {data.repository}")
    return replace(data, revision=revision), f"{data.repository}@{revision[:12]}/{name}", found


def _fetch(data: DataSet) -> tuple[str, str, Path]:
    """Download the first file of text of the split; from the hub's own cache where the hub cannot be reached."""
    from huggingface_hub import HfApi, hf_hub_download

    asked = {"revision": data.revision} if data.revision else {}
    try:
        info = HfApi().dataset_info(data.repository, **asked)
    except Exception as error:
        folder = _cached(data)
        if folder is None:
            raise
        names = [str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file()]
        try:
            name = choose(data, names, [])
        except AssetError:
            raise error from None
        return folder.name, name, folder / name
    names = sorted(file.rfilename for file in info.siblings or [])
    name = choose(data, names, _configs(info))
    path = hf_hub_download(data.repository, name, repo_type="dataset", revision=info.sha)
    return str(info.sha), name, Path(path)


def _cached(data: DataSet) -> Path | None:
    """Folder of the data set in the hub's cache on this machine."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(data.repository, repo_type="dataset", revision=data.revision, local_files_only=True)
        )
    except Exception:
        return None


def choose(data: DataSet, names: Sequence[str], configs: Sequence[dict[str, Any]]) -> str:
    """Choose the file that is read: the first one of the split, by the data set's card or by the files' paths.

    Parameters
    ----------
    data : DataSet
    names : sequence of str
        Paths of all files in the repository.
    configs : sequence of dict
        The section ``configs`` of the card; empty where there is none.

    Raises
    ------
    AssetError
        If there is none; the message says which splits or configurations there are.
    """
    found = [name for name in names if name.lower().endswith(ENDINGS) and name.split("/")[-1] not in NOT_TEXT]
    if not found:
        raise AssetError(f"the data set {data.repository} has no file that ends with {', '.join(ENDINGS)}")
    declared = [one for one in configs if data.config in (None, one.get("config_name"))]
    if data.config is not None and not declared:
        inside = [name for name in found if data.config in name.split("/")[:-1]]
        if not inside:
            known = [str(one["config_name"]) for one in configs if one.get("config_name")]
            known = known or sorted({part for name in found for part in name.split("/")[:-1]})
            raise AssetError(f"{data.repository} has no configuration {data.config!r}; allowed: {_listed(known)}")
        found = inside
    elif data.config is not None or data.split is not None:
        parts = [part for one in declared for part in _parts(one)]
        of_config = [name for name in found if any(fnmatch(name, pattern) for _, pattern in parts)]
        of_split = [name for name in found if any(s == data.split and fnmatch(name, p) for s, p in parts)]
        if data.split is not None and of_split:
            return of_split[0]
        found = (of_config if data.config is not None else found) or found
    if data.split is None:
        return next((name for name in found if "train" in name), found[0])
    chosen = [name for name in found if data.split in [*re.split(r"[^\w]+|_", name), *name.split("/")]]
    if not chosen:
        raise AssetError(f"{data.repository} has no split {data.split!r}; it has the files {_listed(found)}")
    return chosen[0]


def _configs(info: Any) -> list[dict[str, Any]]:
    card = getattr(info, "card_data", None)
    found = card.get("configs") if card is not None and hasattr(card, "get") else None
    return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def _parts(config: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """Splits of a configuration with the patterns of their files."""
    files = config.get("data_files")
    if isinstance(files, str):
        yield "train", files
    for part in files if isinstance(files, list) else []:
        if isinstance(part, dict):
            paths = part.get("path")
            for path in paths if isinstance(paths, list) else [paths]:
                yield str(part.get("split")), str(path)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "none"
