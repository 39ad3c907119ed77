"""Token policies written in one word."""

from __future__ import annotations

import pytest

from resting.sparsifier import AllButFirst, DecodeOnly, LastFraction, SparsifierError
from resting.sparsifier.policy import parse


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("all-but-first", AllButFirst(1)),
        ("all-but-first:0", AllButFirst(0)),
        (" all-but-first:12 ", AllButFirst(12)),
        ("last-fraction", LastFraction(0.5)),
        ("last-fraction:0.1", LastFraction(0.1)),
        ("last-fraction:1", LastFraction(1.0)),
        ("decode-only", DecodeOnly()),
        ("decode-only:0", DecodeOnly(0)),
        ("decode-only:64", DecodeOnly(64)),
    ],
)
def test_policies_are_read(text, policy):
    assert parse(text) == policy


@pytest.mark.parametrize(
    "policy",
    [AllButFirst(0), AllButFirst(4), LastFraction(0.25), LastFraction(0.1, True), DecodeOnly(), DecodeOnly(8)],
)
def test_what_tables_show_is_read_too(policy):
    assert parse(str(policy)) == policy


@pytest.mark.parametrize(
    "text", ["", "all", "all-but-first:", "all-but-first:x", "all-but-first:-1", "decode-only:0.5", "last-fraction:"]
)
def test_anything_else_is_refused(text):
    with pytest.raises(SparsifierError, match=r"token policy .*; allowed: all-but-first\[:N\], last-fraction"):
        parse(text)


@pytest.mark.parametrize("text", ["last-fraction:1.5", "last-fraction:1.5.2"])
def test_a_number_out_of_range_is_named(text):
    with pytest.raises(SparsifierError, match=text):
        parse(text)
