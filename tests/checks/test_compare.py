"""Two folders are compared row by row where all that identifies a row is the same; what differs is said."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import tiny
from results_folder import folder_with, row, windows

from resting.benchmarks.checks import compare
from resting.benchmarks.errors import BenchmarkError

ROWS = [
    row("dense", 10.0, 0.0, 0.0, window=512),
    row("teal", 11.0, window=512),
    row("teal", 0.2, metric="news_kl", window=512),
]


def two(tmp_path, changed, **models):
    a = folder_with(tmp_path / "a", ROWS)
    return a, folder_with(tmp_path / "b", changed, **models)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 1024}, "window 512, {b} has 1024"),
        ({"dtype": "bfloat16"}, "dtype float32, {b} has bfloat16"),
        ({"n": 200}, "n 100, {b} has 200"),
        ({"weights": "1" * 12}, "weights 000000000000, {b} has 111111111111"),
        ({"window": 1024, "n": 200}, "window 512, {b} has 1024, n 100, {b} has 200"),
        ({"model": "other"}, "{b} has no such model (tiny)"),
        ({"tokens": "last-0.5"}, "{b} has no such tokens (all-but-first-1)"),
        ({"seed": 1}, "{b} has no such seed (0)"),
        ({"dataset": "tales"}, "{b} has no such dataset (news)"),
    ],
)
def test_rows_of_another_setting_are_not_joined(tmp_path, monkeypatch, capsys, change, said):
    a, b = two(tmp_path, [one | change for one in ROWS])
    with pytest.raises(BenchmarkError, match="no row in common"):
        compare.compare(a, b)
    assert compare.only_in(a, b) == (3, 3)
    assert f"3 rows only in {a}: {said.format(b=b)}" in compare.only_in_words(a, b)
    assert tiny.resting(monkeypatch, "compare", str(a), str(b)) == 2
    assert f"3 rows only in {a}: " in capsys.readouterr().err


def test_what_both_have_is_compared_and_the_rest_is_said(tmp_path, monkeypatch, capsys):
    a, b = two(tmp_path, [ROWS[0] | {"window": 1024}, ROWS[1] | {"value": 22.0}, ROWS[2]])
    found = compare.compare(a, b)
    assert len(found) == 2
    assert compare.only_in(a, b) == (1, 1)
    assert compare.only_in_words(a, b) == [
        f"1 row only in {a}: window 512, {b} has 1024",
        f"1 row only in {b}: window 1024, {a} has 512",
    ]
    assert tiny.resting(monkeypatch, "compare", str(a), str(b)) == 0
    out = capsys.readouterr().out
    assert "1 of 2 rows changed." in out
    assert "window 512" in out


def test_models_of_one_name_are_told_apart_by_provenance(tmp_path):
    a, b = two(tmp_path, ROWS, models=[{"name": "tiny", "sha256": "1" * 64}])
    with pytest.raises(BenchmarkError, match=r"weights 000000000000, .* has 111111111111"):
        compare.compare(a, b)
    (b / "provenance.json").unlink()  # weights that are not known tell nothing apart
    assert not compare.compare(a, b).changed.any()


@pytest.mark.parametrize("paired", [False, True])
def test_a_difference_is_in_the_unit_of_its_header(tmp_path, paired):
    of = windows({("teal", 0.5): math.log(1.1)})
    more = windows({("teal", 0.5): math.log(1.1) + math.log(1.2)}) if paired else None
    a = folder_with(tmp_path / "a", ROWS, of if paired else None)
    b = folder_with(tmp_path / "b", [ROWS[0], ROWS[1] | {"value": 13.2}, ROWS[2] | {"value": 0.5}], more)
    found = compare.compare(a, b).set_index(["method", "metric"])
    perplexity, kl = found.loc["teal", "news_perplexity"], found.loc["teal", "news_kl"]
    assert perplexity.difference == pytest.approx(13.2 - 11.0)
    assert kl.difference == pytest.approx(0.5 - 0.2)
    if paired:  # every window has the same difference of logs
        assert perplexity.how == f"paired, {len(of) // 2} windows"
        assert (perplexity.low, perplexity.high) == pytest.approx((2.2, 2.2))
    else:  # the delta method on logs, and back
        spread = 1.96 * np.hypot(0.1 / 11.0, 0.1 / 13.2)
        ends = [11.0 * math.expm1(math.log(1.2) + sign * spread) for sign in (-1, 1)]
        assert (perplexity.low, perplexity.high) == pytest.approx(ends)
        assert perplexity.low < perplexity.difference < perplexity.high
    text = compare.text(compare.compare(a, b))
    assert "b - a" in text
    assert f"{2.2:+.4g} [" in text


def test_a_row_twice_is_refused(tmp_path):
    a, b = two(tmp_path, [*ROWS, ROWS[1] | {"value": 99.0}])
    with pytest.raises(BenchmarkError, match="two rows of one number"):
        compare.compare(a, b)


def test_rows_are_those_of_both_orders(tmp_path):
    a, b = two(tmp_path, list(reversed(ROWS)))
    assert not compare.compare(a, b).changed.any()
    assert pd.Series(compare.only_in(a, b)).sum() == 0
