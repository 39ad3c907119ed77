"""The one bootstrap, against scipy's and by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from resting.benchmarks.quality import intervals


def test_the_mean_and_its_interval():
    random = np.random.default_rng(1)
    items = [random.normal(0.3, 1.0, 400), random.normal(0.5, 1.0, 400)]
    found = intervals.mean(items)
    assert found.value == pytest.approx(np.mean([i.mean() for i in items]))
    half = 1.96 * math.sqrt(sum(i.var() / 400 for i in items)) / 2
    assert found.low == pytest.approx(found.value - half, abs=0.01)
    assert found.high == pytest.approx(found.value + half, abs=0.01)
    assert not found.holds_zero
    assert intervals.mean([np.zeros(2)]).holds_zero  # too few to say


def test_a_paired_difference_is_narrower_than_that_of_two_means():
    random = np.random.default_rng(2)
    dense = random.integers(0, 2, 500).astype(float)
    sparse = np.where(random.random(500) < 0.02, 1 - dense, dense)
    gap = intervals.difference(sparse, dense)
    assert gap.value == pytest.approx(sparse.mean() - dense.mean())
    assert gap.high - gap.low < 0.04
    assert intervals.difference(dense, dense).holds_zero


@pytest.mark.parametrize(("right", "above"), [(130, True), (105, False), (70, False)])
def test_chance(right, above):
    assert intervals.is_above_chance([1.0] * right + [0.0] * (200 - right), 0.5) is above


def test_the_interval_is_scipy_s():
    """The same samples are drawn as scipy draws with a generator of the same seed, group by group."""
    random = np.random.default_rng(3)
    groups = [random.normal(size=30), random.normal(size=50)]
    found = stats.bootstrap(
        groups,
        lambda *drawn, axis=-1: np.mean([of.mean(axis) for of in drawn], 0),
        n_resamples=intervals.RESAMPLES,
        method="percentile",
        random_state=np.random.default_rng(0),
    ).confidence_interval
    assert intervals.paired_interval(groups) == pytest.approx((found.low, found.high), rel=1e-12)


def test_numbers_are_drawn_together():
    values = [np.random.default_rng(4).normal(5.0, 2.0, 40)]
    low, high = intervals.paired_interval([3 * values[0]], values, of=lambda a, b: a / b)
    assert (low, high) == pytest.approx((3.0, 3.0))


def test_few_values_have_no_interval():
    assert np.isnan(intervals.paired_interval([np.arange(9.0), np.zeros(intervals.FEWEST - 1)])).all()
    assert not np.isnan(intervals.paired_interval([np.arange(9.0), np.zeros(intervals.FEWEST)])).any()


def test_places_are_the_same_whether_kept_or_not(monkeypatch):
    groups = [np.random.default_rng(5).normal(size=n) for n in (20, 31)]
    kept = intervals.paired_interval(groups)
    monkeypatch.setattr(intervals, "KEPT", 0)
    assert intervals.paired_interval(groups) == kept


def test_an_end_at_zero_is_zero():
    """Differences of right answers are whole numbers: rounding may not move an end off zero."""
    gaps = np.zeros(200)
    gaps[:5] = 1.0
    gaps[5] = -1.0
    low, _ = intervals.paired_interval([gaps])
    assert low == 0.0
