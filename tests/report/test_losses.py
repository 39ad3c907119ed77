"""Shares of the gap, and the report."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from resting.benchmarks.report import losses, tables
from resting.benchmarks.report.table import shown_target


def recovered(*values):
    """Of one seed."""
    return losses.recovered(*(of[None] for of in values))


def test_recovered_by_hand():
    dense, base, compensated = np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 5.0]), np.array([1.5, 3.0, 4.0])
    share = recovered(dense, base, compensated)
    assert share.value == pytest.approx((0.5 + 0 + 1) / (1 + 1 + 2))
    assert share.low <= share.value <= share.high
    assert recovered(dense, base, base).within_noise
    assert recovered(dense, base, dense).value == 1.0


def test_a_share_of_a_gap_within_noise_is_none():
    dense = np.zeros(20)
    gap = np.tile([0.5, -0.5], 10) + 0.01
    assert recovered(dense, gap, dense).of_nothing
    assert not recovered(dense, gap + 1.0, dense).of_nothing
    assert tables.mark(recovered(dense, gap, dense)) == "- (no loss beyond noise)"


@pytest.mark.parametrize(("target", "shown"), [(0.5, "0.50"), (0.125, "0.125"), (0.047, "0.047"), (0.25, "0.25")])
def test_targets_are_told_apart(target, shown):
    assert shown_target(target) == shown


def test_the_interval_is_seeded_and_covers():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(40):
        dense = rng.normal(3, 0.3, 40)
        base = dense + rng.normal(1.0, 0.2, 40)
        compensated = base - rng.normal(0.3, 0.2, 40)
        share = recovered(dense, base, compensated)
        assert share == recovered(dense, base, compensated)
        hits += share.low <= 0.3 <= share.high
    assert hits >= 33


def rows(method, target, values, text):
    columns = {"method": method, "target": target, "seed": 0, "metric": f"{text}_nll"}
    return pd.DataFrame([columns | {"window": i, "value": v} for i, v in enumerate(values)])


def test_shares_of_a_reference_s_loss_over_texts():
    """Texts weigh the same: losses of 1 and 3 become 0.5 and 1, so 1.5 of 4."""
    dense = np.linspace(2.0, 3.0, 12)
    parts = []
    for text, (base, better) in {"news": (1.0, 0.5), "tales": (3.0, 1.0)}.items():
        parts += [rows("dense", 0.0, dense, text), rows("teal", 0.5, dense + base, text)]
        parts.append(rows("spon(teal)", 0.5, dense + better, text))
    table = losses.reference_shares(pd.concat(parts), ["news", "tales"], "teal")
    assert list(table.index) == ["spon(teal)"]
    share = table.loc["spon(teal)", 0.5]
    assert (share.value, share.low, share.high) == pytest.approx((1 - 1.5 / 4,) * 3)
    assert losses.reference_shares(pd.concat(parts), ["news", "tales"], "cats").empty
    parts += [rows("cats", 0.25, dense + 1.0, text) for text in ("news", "tales")]  # where teal has no number
    assert list(losses.reference_shares(pd.concat(parts), ["news", "tales"], "teal").index) == ["spon(teal)"]
    few = losses.reference_shares(pd.concat(parts).query("window < 2"), ["news", "tales"], "teal")
    assert np.isnan(few.loc["spon(teal)", 0.5].low)


def test_too_few_windows_tell_nothing_apart():
    """Two windows have no interval: none is written, and no method is told from the best."""
    dense = np.array([2.0, 3.0])
    frame = pd.concat([rows("dense", 0.0, dense, "a"), rows("teal", 0.5, dense + 0.1, "a")])
    frame = pd.concat([frame, rows("spon(teal)", 0.5, dense + 0.3, "a")])
    table = losses.losses(frame, ["a"])
    best, other = table.loc["teal", 0.5], table.loc["spon(teal)", 0.5]
    assert str(best) == "**0.100 (no interval: fewer than 3 windows)**"
    assert str(other) == "0.300 (no interval: fewer than 3 windows) ≈"
    share = losses.reference_shares(frame, ["a"], "teal").loc["spon(teal)", 0.5]
    assert str(share) == "-200 % (no interval: fewer than 3 windows)"


@pytest.mark.parametrize(("out", "best"), [({}, "teal"), ({("teal", 0.5): "measured 0.37"}, "cats")])
def test_the_smallest_of_those_that_are_ranked_is_the_best(out, best):
    assert bold(out) == [best]


def test_the_one_method_that_is_ranked_is_no_best_beside_others():
    assert bold({("teal", 0.5): "measured 0.37", ("cats", 0.5): "measured 0.41"}) == []


def bold(out):
    """Methods in bold, of three that lose 0.1, 0.2 and 0.3."""
    dense = np.linspace(2.0, 3.0, 12)
    lost = {"teal": 0.1, "cats": 0.2, "chess": 0.3}
    parts = [rows("dense", 0.0, dense, "a"), *(rows(name, 0.5, dense + nats, "a") for name, nats in lost.items())]
    table = losses.losses(pd.concat(parts), ["a"], out)
    return [name for name in table.index if str(table.loc[name, 0.5]).startswith("**")]
