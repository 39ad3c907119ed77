"""Intervals over windows and seeds: against formulas, and how often they hold what is true."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from results_folder import DENSE, folder_with, row, windows
from scipy import stats

from resting.benchmarks.quality import intervals
from resting.benchmarks.report import losses, sections, tables
from resting.benchmarks.report.compared import seeds


def drawn(random, count, values, of_seeds, of_values):
    """One text [seeds, values] of mean zero: an effect of every seed, and one of every window that seeds share."""
    return random.normal(0, of_seeds, (count, 1)) + random.normal(0, of_values, (1, values))


@given(st.integers(0, 99), st.integers(1, 5))
def test_seeds_that_agree_add_nothing(number, count):
    values = np.random.default_rng(number).normal(size=12)
    same = np.tile(values, (count, 1))
    assert seeds.interval([same]) == pytest.approx(intervals.paired_interval([values]), rel=1e-12)
    assert seeds.mean([same]).value == pytest.approx(values.mean())


@pytest.mark.parametrize("count", [2, 3, 8])
def test_seeds_alone_have_the_interval_of_student_s_t(count):
    """Windows that are all alike leave the seeds, which are `count` normal values."""
    by_seed = np.random.default_rng(count).normal(0.3, 0.1, count)
    found = seeds.mean([np.tile(by_seed[:, None], (1, 9)), np.tile(by_seed[:, None], (1, 5))])
    expected = stats.t.interval(0.95, count - 1, by_seed.mean(), stats.sem(by_seed))
    half = (expected[1] - expected[0]) / 2
    assert (found.low, found.high) == pytest.approx(expected, abs=0.02 * half)


def test_both_parts_against_welch():
    """Two independent errors, as Welch's test adds them: degrees of freedom after Satterthwaite."""
    of = drawn(np.random.default_rng(5), 6, 80, 0.2, 1.0)
    parts = stats.sem(of.mean(1)) ** 2, stats.sem(of.mean(0)) ** 2
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / 5 + parts[1] ** 2 / 79)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(sum(parts))
    low, high = seeds.interval([of])
    assert (high - low) / 2 == pytest.approx(half, rel=0.08)
    assert (high + low) / 2 == pytest.approx(of.mean(), abs=0.1 * half)


@pytest.mark.parametrize(("of_seeds", "of_values"), [(0.1, 1.0), (0.3, 1.0), (1.0, 0.5)])
def test_three_seeds_cover_what_is_true(of_seeds, of_values):
    """Resampling three seeds would hold the truth in as few as three quarters of the trials."""
    random = np.random.default_rng(6)
    ends = [seeds.interval([drawn(random, 3, 40, of_seeds, of_values)]) for _ in range(300)]
    assert sum(low <= 0.0 <= high for low, high in ends) >= 0.915 * 300  # 95 % less three standard errors


def test_a_difference_pairs_windows_and_no_seeds():
    random = np.random.default_rng(7)
    shared = random.normal(0, 5.0, (1, 50))
    one, other = shared + 0.5 + drawn(random, 3, 50, 0.01, 0.1), shared + drawn(random, 2, 50, 0.001, 0.1)
    gap = seeds.difference([one], [other])
    assert gap.value == pytest.approx(one.mean() - other.mean())
    assert not gap.holds_zero
    assert seeds.mean([one]).high - seeds.mean([one]).low > 10 * (gap.high - gap.low)
    back = seeds.difference([other], [one])
    assert (-back.high, -back.low) == pytest.approx((gap.low, gap.high), abs=0.1 * (gap.high - gap.low))


def test_lost_keeps_seeds_apart_and_texts_in_order():
    """A seed that lacks a text, or one window, is not left out of a mean."""
    frames = [windows({("teal", 0.5): 0.2}), windows({("spon(teal)", 0.5): 0.1})]
    frames += [windows({("spon(teal)", 0.5): 0.3}, seed=1)]
    news = pd.concat(frames).drop_duplicates(["method", "seed", "metric", "window"])
    news = news[(news.method != "dense") | (news.seed == 0)]
    tales = news.assign(metric="tales_nll", value=news.value + 1.0)
    found = losses.lost(pd.concat([tales, news]), ["news", "tales"])
    assert [of.shape for of in found["spon(teal)", 0.5]] == [(2, len(DENSE))] * 2
    assert [of.mean() for of in found["spon(teal)", 0.5]] == pytest.approx([0.2, 0.2])
    short = tales[(tales.method != "spon(teal)") | (tales.seed == 0)]
    first, second = losses.lost(pd.concat([short, news]), ["news", "tales"])["spon(teal)", 0.5]
    assert np.isfinite(first).all()
    assert np.isnan(second[1]).all()
    table = losses.losses(pd.concat([short, news]), ["news", "tales"])
    assert np.isnan(table.loc["spon(teal)", 0.5].value)
    assert table.loc["teal", 0.5].best


def test_a_report_of_a_suite_with_seeds(tmp_path):
    """Losses of 0.1, 0.2 and 0.3 by seed: their mean, and Student's interval of three."""
    rows = [row("dense", 10.0, 0.0, 0.0), row("teal", 15.0, 0.5)]
    rows += [row("spon(teal)", 11.0 + seed, 0.5, seed=seed) for seed in range(3)]
    singles = [windows({("teal", 0.5): 0.4})]
    singles += [windows({("spon(teal)", 0.5): 0.1 * (seed + 1)}, seed=seed).query("target > 0") for seed in range(3)]
    folder = folder_with(tmp_path / "mine", rows, pd.concat(singles))
    sections.write(folder)
    text = (folder / "README.md").read_text()
    shown = re.search(r"\| spon\(teal\) \| \*\*0\.200 \[(\S+), (\S+)\]", text)
    expected = stats.t.interval(0.95, 2, 0.2, 0.1 / np.sqrt(3))
    assert [float(end) for end in shown.groups()] == pytest.approx(expected, abs=0.005)
    assert "Several seeds: spon(teal) (3)." in text
    assert "Perplexity ± standard error over windows and seeds." in text
    assert f"| spon(teal) | 12.00 ± {np.hypot(0.1, 1 / np.sqrt(3)):.2f} |" in text.replace("  ", " ")
    assert "| teal       | 15.00 ± 0.10 |" in text


def test_one_seed_is_not_spoken_of(tmp_path):
    rows = [row("dense", 10.0, 0.0, 0.0), row("teal", 15.0, 0.5)]
    folder = folder_with(tmp_path / "mine", rows, windows({("teal", 0.5): 0.4}))
    sections.write(folder)
    assert "seed" not in (folder / "README.md").read_text().replace("seeded sample", "")


def test_standard_errors_of_several_seeds():
    """The windows' error remains in a mean over seeds, which share them."""
    frame = pd.DataFrame([row("spon(teal)", value, seed=i) for i, value in enumerate((20.0, 21.0, 25.0))])
    table = tables.values(frame, "news_perplexity", "news", "")
    error = np.hypot(0.1, stats.sem([20.0, 21.0, 25.0]))
    assert table.rows == [["spon(teal)", f"22.00 ± {error:.2f}"]]
