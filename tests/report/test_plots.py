"""Plots: every method is told from the others, and a reader finds the numbers that were given."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from resting.benchmarks.report import losses, plots
from resting.benchmarks.report.losses import Loss

METHODS = [
    "teal",
    "teal, only down",
    *(f"spon(teal), {n} steps" for n in range(6)),
    "mean-error(teal)",
    "spon(teal)",
    "spon(teal), 400 steps",
    "cats",
    "spon(cats)",
    "mine",
    "yours",
]


@pytest.mark.parametrize(
    ("label", "base"),
    [
        ("teal", "teal"),
        ("spon(teal-greedy)", "teal-greedy"),
        ("spon(teal), TEAL's thresholds (all)", "teal"),
        ("mean-error(spon(cats)), 2 steps", "cats"),
        ("teal, original", "teal"),
    ],
)
def test_innermost(label, base):
    assert losses.innermost(label) == base


def test_no_two_methods_look_alike():
    styles = plots.styles(METHODS)
    assert len({tuple(map(str, style.values())) for style in styles.values()}) == len(METHODS)
    assert styles["teal, only down"]["markerfacecolor"] == "white" != styles["spon(teal)"]["markerfacecolor"]
    assert styles["teal"]["color"] == styles["spon(teal)"]["color"] != styles["cats"]["color"]


@pytest.fixture
def kept(monkeypatch):
    """Figures, instead of being closed."""
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    return figures


def test_perplexity_shows_curves_and_cuts_what_is_no_language_model(tmp_path, kept):
    rows = [("dense", 0.0, 0.0, 20.0), ("teal", 0.4, 0.41, 22.0), ("teal", 0.5, 0.49, 30.0)]
    rows += [("cats", 0.4, 0.4, 1e3), ("cats", 0.5, 0.5, 1e12), ("chess", 0.5, 0.5, 25.0)]
    frame = pd.DataFrame(rows, columns=["method", "target", "byte_sparsity", "value"])
    frame["metric"] = "news_perplexity"
    assert plots.perplexity(frame, ["news"], "tiny", tmp_path) == "perplexity.png"
    assert {f.name for f in tmp_path.iterdir()} == {"perplexity.png", "perplexity.svg"}
    axis = kept[0].axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    assert list(lines["teal"].get_xdata()) == [0.41, 0.49]
    assert list(lines["teal"].get_ydata()) == [22.0, 30.0]
    assert "cats" in lines
    assert "chess" not in lines  # a single point is no curve: it stands in the plot of losses
    assert axis.get_ylim()[1] == pytest.approx(20 * plots.CEILING)


@pytest.mark.parametrize("worst", [0.3, 29.0])
def test_losses_are_sorted_with_the_smallest_on_top(tmp_path, kept, worst):
    table = pd.Series({"cats": Loss(worst, worst - 0.1, worst + 0.1), "teal": Loss(0.1, 0.08, 0.12)})
    assert plots.losses(table, "tiny", tmp_path, "x-") == "x-losses.png"
    axis = kept[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["cats", "teal"]
    assert axis.get_xlim()[0] < 0.08
    assert axis.get_xlim()[1] > worst + 0.1


def test_losses_below_zero_and_without_intervals(tmp_path, kept):
    nan = float("nan")
    plots.losses(pd.Series({"a": Loss(-0.01, nan, nan), "b": Loss(0.2, 0.1, 0.3)}), "tiny", tmp_path)
    plots.losses(pd.Series({"a": Loss(0.01, nan, nan), "b": Loss(0.2, nan, nan)}), "tiny", tmp_path)
    assert [figure.axes[0].get_xscale() for figure in kept] == ["linear", "log"]
