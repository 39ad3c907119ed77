"""Shares of the gap, and the report."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import analysis


@pytest.mark.parametrize(
    ("method", "base"),
    [
        ("spon(teal)", "teal"),
        ("spon(mean-error(teal))", "mean-error(teal)"),
        ("spon(teal), 144 steps", "teal"),
        ("teal", None),
    ],
)
def test_base_of(method, base):
    assert analysis.base_of(method) == base


def test_recovered_by_hand():
    dense, base, compensated = np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 5.0]), np.array([1.5, 3.0, 4.0])
    share = analysis.recovered(dense, base, compensated)
    assert share.value == pytest.approx((0.5 + 0 + 1) / (1 + 1 + 2))
    assert share.low <= share.value <= share.high
    assert analysis.recovered(dense, base, base).within_noise
    assert analysis.recovered(dense, base, dense).value == 1.0


def test_the_interval_is_seeded_and_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        dense = rng.normal(3, 0.3, 40)
        base = dense + rng.normal(1.0, 0.2, 40)
        compensated = base - rng.normal(0.3, 0.2, 40)
        share = analysis.recovered(dense, base, compensated)
        assert share == analysis.recovered(dense, base, compensated)
        hits += share.low <= 0.3 <= share.high
    assert hits >= 33
