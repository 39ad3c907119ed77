"""Differences that rounding explains carry a mark, and how windows are cut and begin is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from resting.benchmarks.checks.guard import text
from resting.benchmarks.report import beginnings, tables
from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report.compared import jitter

CELLS = [{"model": "a", "begins_with": ["<s>"]}, {"model": "b", "begins_with": []}, {"model": "b"}]


def windows(spread: float, count: int = 8) -> pd.DataFrame:
    """TEAL 0.4 above dense, the other `spread` above TEAL in every window: so the paired interval excludes 0."""
    levels = {"dense": 3.0, "teal": 3.4, "other": 3.4 + spread, "far": 4.4}
    random = np.random.default_rng(0).normal(0.0, 0.2, count)
    return pd.DataFrame(
        [
            (method, 0.0 if method == "dense" else 0.5, 0, "papers_nll", i, level + random[i])
            for method, level in levels.items()
            for i in range(count)
        ],
        columns=["method", "target", "seed", "metric", "window", "value"],
    )


@pytest.mark.parametrize(
    ("spread", "tokens", "marked"),
    [
        (0.02, 1024, True),  # 5 % of the loss, and 6 % is a typical move
        (0.02, 65536, False),  # an eighth of 6 % there
        (0.002, 65536, True),
        (0.1, 1024, False),  # above two typical moves
    ],
)
def test_a_distance_that_jitter_explains_is_marked(spread, tokens, marked):
    table = tables.losses(analysis.losses(windows(spread), ["papers"]), "A suite", tokens)
    cells = {line[0]: line[1] for line in table.rows}
    assert cells["teal"].startswith("**")
    assert cells["other"].endswith(" ~") == marked
    assert "≈" not in cells["other"]
    assert not cells["far"].endswith(" ~")
    assert ("thresholds that are 0.02 % off" in table.caption) == marked


def test_what_is_within_noise_keeps_its_mark_alone():
    tied = windows(0.0)
    tied.loc[tied.method == "other", "value"] += np.tile([0.01, -0.01], 4)
    cells = {r[0]: r[1] for r in tables.losses(analysis.losses(tied, ["papers"]), "x", 1024).rows}
    assert [cells[name].endswith(" ≈") or cells[name].startswith("**") for name in ("teal", "other")] == [True, True]
    assert not any("~" in cell for cell in cells.values())


def test_the_rule_is_two_typical_moves_which_fall_with_the_root_of_the_text():
    assert jitter.explained_by_jitter(0.1199, 1.0, 1024)
    assert not jitter.explained_by_jitter(0.1201, 1.0, 1024)
    assert jitter.explained_by_jitter(-0.0599, 1.0, 4096)
    assert not jitter.explained_by_jitter(0.0601, 1.0, 4096)


def test_moves_are_those_of_samples_of_windows():
    losses, dense = np.zeros(4) + 2.0, np.ones(4)
    moved = [losses + np.array([0.3, 0.1, -0.4, 0.0])]
    assert text.moves(losses, moved, dense, 1) == pytest.approx((np.sqrt((0.09 + 0.01 + 0.16) / 4), 0.4, 0.2549509757))
    assert text.moves(losses, moved, dense, 2)[:2] == pytest.approx((0.2, 0.2))
    assert text.moves(losses, moved, dense, 4)[0] == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("evaluation", "tasks", "cells", "expected"),
    [
        ({}, None, CELLS[:1], "Windows of 8 tokens without overlap, all a text. Windows begin with `<s>`. "),
        (
            {"windows": 3},
            {"names": ["piqa"]},
            CELLS,
            "Windows of 8 tokens without overlap, a seeded sample of 3 a text. Windows and prompts of a begin with "
            "`<s>`. Windows and prompts of b begin without a BOS token. ",
        ),
        (
            {"stride": 4, "scored": 4},
            None,
            CELLS[:1],
            "Windows of 8 tokens that begin every 4 tokens, of which the last 4 are scored, all a text. Texts begin "
            "with `<s>`. ",
        ),
        ({"texts": []}, {"names": ["piqa"]}, CELLS[1:], "Prompts begin without a BOS token. "),
        ({}, None, [{"model": "a"}], "Windows of 8 tokens without overlap, all a text. "),  # results from before
    ],
)
def test_a_readme_says_how_windows_are_cut_and_begin(evaluation, tasks, cells, expected):
    known = {"texts": ["papers"], "window": 8, "windows": None, "scored": None, "stride": None} | evaluation
    assert beginnings.sentences({"suite": {"evaluation": known, "tasks": tasks}, "cells": cells}) == expected
