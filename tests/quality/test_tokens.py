"""A text's kept ids are those that the tokenizer gives, whatever else is in the cache."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import PreTokenizer

from resting.benchmarks.cache import root
from resting.benchmarks.quality import tokens

TEXT = "w1 w2 w3 w5 w8 " * 10_000


def plain(text: str, tokenizer) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def kept() -> list[Path]:
    return sorted((root() / "tokens").glob("[!.]*"))


pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def counted(monkeypatch):
    """How often a text is tokenized."""
    texts = []
    real = tokens._tokenized
    monkeypatch.setattr(tokens, "_tokenized", lambda text, tokenizer: [texts.append(text), real(text, tokenizer)][1])
    return texts


def test_ids_are_those_of_the_tokenizer_and_are_computed_once(counted):
    tokenizer = tiny.tokenizer()
    first, again = tokens.ids_of(TEXT, tokenizer), tokens.ids_of(TEXT, tokenizer)
    assert first.tolist() == again.tolist() == plain(TEXT, tokenizer)
    assert first.dtype == again.dtype
    assert len(counted) == len(kept()) == 1
    again[0] = 96  # what is done to one tensor changes no other
    assert tokens.ids_of(TEXT, tokenizer).tolist() == first.tolist()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.text(max_size=20), max_size=20), st.integers(0, 60))
def test_whatever_the_text(monkeypatch, parts, least):
    monkeypatch.setattr(tokens, "LEAST", least)
    tokenizer = tiny.tokenizer()
    text = " ".join([*parts, *tokenizer.all_special_tokens])
    for split in (False, True, False):
        tokenizer.split_special_tokens = split
        assert tokens.ids_of(text, tokenizer).tolist() == plain(text, tokenizer)


def test_special_tokens_in_a_text_are_read_as_the_tokenizer_is_set(monkeypatch):
    monkeypatch.setattr(tokens, "LEAST", 0)
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"bos_token": "w1w2"})
    found = []
    for split in (False, True):
        tokenizer.split_special_tokens = split
        found.append(tokens.ids_of("w1w2 w3", tokenizer).tolist())
        assert found[-1] == plain("w1w2 w3", tokenizer)
    assert found[0] != found[1]


def test_a_short_text_leaves_nothing():
    tokens.ids_of(TEXT[:1000], tiny.tokenizer())
    assert not kept()


def test_tokenizers_that_differ_share_nothing():
    one, other, third = tiny.tokenizer(), tiny.tokenizer(), tiny.tokenizer()
    other.add_tokens(["w8 w1"])
    third.backend_tokenizer.normalizer = normalizers.Replace("w3", "w4")
    for tokenizer in (one, other, third, one):
        assert tokens.ids_of(TEXT, tokenizer).tolist() == plain(TEXT, tokenizer)
    assert len({tuple(plain(TEXT, t)) for t in (one, other, third)}) == len(kept()) == 3


def test_the_versions_are_in_the_key(monkeypatch):
    import tokenizers

    tokens.ids_of(TEXT, tiny.tokenizer())
    monkeypatch.setattr(tokenizers, "__version__", "0.0")
    tokens.ids_of(TEXT, tiny.tokenizer())
    assert len(kept()) == 2


def of_a_class(tokenizer, **methods):
    tokenizer.__class__ = type("Own", (type(tokenizer),), methods)


def with_a_method(tokenizer):
    tokenizer._convert_encoding = functools.partial(type(tokenizer)._convert_encoding, tokenizer)


def with_a_part_in_python(tokenizer):
    class Words:
        def pre_tokenize(self, text):
            text.split(lambda n, part: part.split(" ", "removed"))

    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Words())


def with_chance(tokenizer):
    tokenizer._tokenizer = Tokenizer(BPE({"w": 0, "1": 1, "w1": 2, " ": 3}, [("w", "1")], dropout=0.5, unk_token="w"))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: of_a_class(t, _encode_plus=lambda self, *a, **k: type(t).__mro__[1]._encode_plus(self, *a, **k)),
        lambda t: of_a_class(
            t, _convert_encoding=lambda self, *a, **k: type(t).__mro__[1]._convert_encoding(self, *a, **k)
        ),
        of_a_class,
        with_a_method,
        with_a_part_in_python,
        with_chance,
    ],
)
def test_a_tokenizer_that_cannot_be_told_by_its_content_is_always_asked(counted, change):
    tokenizer = tiny.tokenizer()
    change(tokenizer)
    for _ in range(2):
        tokens.ids_of(TEXT, tokenizer)
    assert len(counted) == 2
    assert not kept()


def test_large_ids_are_kept():
    ids = np.array([0, 2**31, 2**32 - 1])
    tokens._write(root() / "tokens" / "x", ids)
    assert tokens._read(root() / "tokens" / "x").tolist() == ids.tolist()


@pytest.mark.parametrize("damage", [lambda b: b[:-4], lambda b: b"", lambda b: b[:40] + b"\1\0\0\0" + b[44:]])
def test_a_damaged_file_is_written_anew(counted, damage):
    tokenizer = tiny.tokenizer()
    tokens.ids_of(TEXT, tokenizer)
    (file,) = kept()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert tokens.ids_of(TEXT, tokenizer).tolist() == plain(TEXT, tokenizer)
    assert len(counted) == 2
    assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_time_alone(counted):
    tokenizer = tiny.tokenizer()
    tokens.ids_of(TEXT, tokenizer)
    (file,) = kept()
    file.unlink()
    file.mkdir()
    for _ in range(2):
        assert tokens.ids_of(TEXT, tokenizer).tolist() == plain(TEXT, tokenizer)
    assert len(counted) == 3
