"""Plots: what each kind shows, as data, and that the renderer hides none of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from resting.benchmarks.report import style, task_tables
from resting.benchmarks.report.losses import Loss
from resting.benchmarks.report.plots import across, draw, quality, speed
from resting.benchmarks.report.plots.chart import Series, axis

KEPT = Path(__file__).parents[1] / "data" / "plots"
CPU, GPU = {"device": "cpu"}, {"device": "a GPU"}


def perplexities():
    rows = [("dense", 0.0, 0.0, 20.0), ("teal", 0.4, 0.41, 22.0), ("teal", 0.5, 0.49, 30.0), ("teal", 0.6, 0.6, 44.0)]
    rows += [("cats", 0.25, 0.25, 25.0), ("cats", 0.4, 0.4, 1e3), ("cats", 0.5, 0.5, 1e12), ("chess", 0.5, 0.5, 25.0)]
    frame = pd.DataFrame(rows, columns=["method", "target", "byte_sparsity", "value"])
    windows = [
        ("news_nll", 0, method, target, w, np.log(value) + 0.1 * w * (1 if method == "teal" else 0.5))
        for method, target, _, value in rows
        for w in range(-2, 3)
    ]
    names = ["metric", "seed", "method", "target", "window", "value"]
    return frame.assign(metric="news_perplexity"), pd.DataFrame(windows, columns=names)


def timed():
    rows = [
        (method, target, target + 0.004, speedup, limit)
        for method, speedups in {"teal": (1.23, 1.39, 1.58), "spon(teal)": (1.24, 1.4, 1.585)}.items()
        for target, speedup, limit in zip((0.25, 0.4, 0.5), speedups, (1.25, 1.46, 1.65))
    ]
    frame = pd.DataFrame(rows, columns=["method", "target", "byte_sparsity", "speedup", "limit"])
    return frame.assign(model="tiny (Q4)", dtype="float32", threads=2)


def charts():
    frame, windows = perplexities()
    table = pd.Series(
        {"cats": Loss(29.0, 28.0, 30.0), "teal": Loss(0.4, 0.39, 0.41), "spon(teal)": Loss(0.3, 0.29, 0.31)}
    )
    drawn = timed()
    samples = {
        ("tiny (Q4)", "float32", 2, "teal", t): np.linspace(0.99, 1.01, 101) * s
        for t, s in ((0.25, 1.23), (0.4, 1.39), (0.5, 1.58))
    }
    joined = drawn.assign(of="tiny (Q4)", dataset="news", nats=[0.05, 0.2, 0.42, 0.04, 0.18, 4.0])
    items = {
        ("teal", t): {"piqa": np.array([[0, -1, 0, -1.0]]), "copa": np.array([[0, 0, -1, 0.0]])} for t in (0.4, 0.5)
    }
    items |= {
        ("spon(teal)", t): {"piqa": np.array([[0, 0, 0, -1.0]]), "copa": np.array([[0, 0, 0, 0.0]])} for t in (0.4, 0.5)
    }
    places = [(100.0, "a-model\n100 M"), (106.0, "another-model-instruct\n106 M"), (1310.0, "large\n1,310 M")]
    sizes = {
        target: {
            "teal": [(factor * v, factor * v - 0.01, factor * v + 0.01) for v in (0.4, 0.39, 0.2)],
            "cats": [(25.0, 24.0, 26.0), None, (2.0, 1.9, 2.1)],
        }
        for target, factor in ((0.5, 1.0), (0.6, 2.4))
    }
    return {
        "perplexity": quality.perplexity_chart(frame, ["news"], "tiny", windows),
        "losses": quality.losses_chart(table, "tiny, at 0.5"),
        "decode": speed.decode_chart(drawn, CPU, samples),
        "quality-against-time": speed.quality_chart(joined, CPU, {}),
        "quality-of-another": speed.quality_chart(joined.assign(of="other", threads=1), GPU, {}),
        "across": across.chart(
            sizes, places, "models by weights in their blocks", "nats a token above dense", "x", 3.0
        ),
        "tasks": task_tables.chart(items, 60.0, ["piqa", "copa"], "tiny"),
    }


CHARTS = charts()


@pytest.mark.parametrize("name", CHARTS)
def test_a_plot_shows_what_it_did(name):
    """After a change that is meant: python -P tests/report/test_plots.py writes the files again; look at the plots."""
    assert CHARTS[name].as_dict() == json.loads((KEPT / f"{name}.json").read_text())


@pytest.mark.parametrize("name", CHARTS)
def test_nothing_is_on_the_frame_and_axes_are_full(name):
    for panel in CHARTS[name].panels:
        for series in panel.series:
            for of, values in ((panel.x, series.x), (panel.y, series.y)):
                inside = [v for v in values if v <= of.high]  # what is beyond is written at the edge
                assert all(of.low < v < of.high for v in inside)
        assert len(panel.x.ticks) >= 3
        values = [v for s in panel.series for v in (*s.x, *s.low, *s.high) if v <= panel.x.high]
        values = values if CHARTS[name].kind == "dots" else [v for s in panel.series for v in s.x]
        values += [] if panel.level is None or CHARTS[name].kind != "dots" else [panel.level[0]]
        if len(values) > 1 and panel.x.scale == "linear":
            assert max(values) - min(values) > 0.5 * (panel.x.high - panel.x.low)


def test_broken_methods_squash_nothing_and_are_named():
    chart = CHARTS["losses"]
    assert chart.panels[0].x.high < style.BROKEN
    cats = next(series for series in chart.panels[0].series if series.method == "cats")
    assert cats.text == ["29.0"]
    assert "cats at 0.40 (3.9), cats at 0.50 (24.6)" in CHARTS["perplexity"].note
    assert "spon(teal) at 0.50 (4.0)" in CHARTS["quality-against-time"].note


def many(losses):
    rows = [("news", "dense", 0.0, 0.0), ("books", "dense", 0.0, 0.0)]
    rows += [
        (text, method, target, factor * loss)
        for text in ("news", "books")
        for method, loss in losses.items()
        for target, factor in ((0.4, 0.5), (0.5, 1.0), (0.6, 1.4))
    ]
    frame = pd.DataFrame(rows, columns=["text", "method", "target", "nats"])
    return frame.assign(
        metric=frame.text + "_perplexity", byte_sparsity=frame.target, value=20.0 * np.exp(frame.nats)
    ).drop(columns=["text", "nats"])


def shown(losses, reference="teal"):
    frame = many(losses)
    names = list(losses)
    drawn, note = quality.few(frame, ["news", "books"], names, reference)
    chart = quality.perplexity_chart(frame, ["news", "books"], "tiny", None, reference)
    assert note in chart.note
    for panel in chart.panels:
        assert sorted(series.method for series in panel.series) == sorted(drawn)
    named = [name for part in note.split(". ") if part for name in part.rstrip(".").rpartition(": ")[2].split(", ")]
    assert sorted([*drawn, *named]) == sorted(names), "every method is drawn or named, and none is both"
    return drawn, note


def test_so_many_methods_as_can_be_told_are_all_drawn():
    losses = {f"m{i}": 0.1 * (i + 1) for i in range(quality.MOST - 1)} | {"teal": 0.1}
    assert shown(losses) == (list(losses), "")


def test_of_many_methods_those_that_lose_least_are_drawn_and_the_reference():
    losses = {f"m{i}": (0.1 + 0.06 * i) ** 2 for i in range(16)} | {"teal": 1.99}
    drawn, note = shown(losses)
    assert drawn == [*(f"m{i}" for i in range(quality.MOST - 1)), "teal"]
    assert note == "Not among those that lose least at 0.50, and not drawn: m11, m12, m13, m14, m15."
    assert shown(losses, None)[0] == [f"m{i}" for i in range(quality.MOST)]


def test_of_many_methods_one_on_the_curve_of_another_takes_no_place():
    losses = {f"m{i}": 0.02 * 1.3**i for i in range(13)} | {"teal": 0.3, "above": 0.31, "below": 0.29}
    drawn, note = shown(losses)
    assert "teal" in drawn
    on = re.search(r"On the curve of teal \(within 2 % of the axis\), and not drawn: ([^.]*)\.", note)
    assert {"above", "below"} <= set(on[1].split(", "))


@pytest.mark.parametrize("seed", range(5))
def test_curves_that_are_not_drawn_are_where_the_note_says(seed):
    """An oracle from the axis' own definition: a named twin is as high as the drawn one, as a share of sqrt(BROKEN)."""
    random = np.random.default_rng(seed)
    losses = dict(zip([*(f"m{i}" for i in range(30)), "teal"], random.uniform(0.005, 2.0, 31)))
    drawn, note = shown(losses)
    assert len(drawn) == quality.MOST
    for other, names in re.findall(r"On the curve of (\S+) [^:]*: ([^.]*)\.", note):
        for name in names.split(", "):
            for factor in (0.5, 1.0, 1.4):
                heights = [np.sqrt(factor * losses[m]) for m in (other, name)]
                assert abs(heights[0] - heights[1]) < 0.02 * np.sqrt(3.0)
    rest = re.search(r"not drawn: ([^:]*)\.$", note)
    least = max(losses[m] for m in drawn if m != "teal")
    assert all(losses[name] > least for name in rest[1].split(", "))


def test_titles_tell_threads_and_a_gpu_has_none():
    drawn = timed()
    titles = {speed.decode_chart(drawn.assign(threads=n), on, {}).title for n, on in ((1, CPU), (2, CPU), (1, GPU))}
    assert titles == {"tiny, float32, 1 CPU thread", "tiny, float32, 2 CPU threads", "tiny, float32, a GPU"}


def test_axes_name_both_models_where_they_are_two():
    (panel,) = CHARTS["quality-of-another"].panels
    assert "of tiny" in panel.x.label
    assert "of other" in panel.y.label
    (panel,) = CHARTS["quality-against-time"].panels
    assert "tiny" not in panel.x.label + panel.y.label


@pytest.mark.parametrize(("values", "scale"), [((0.3, 0.5), "linear"), ((0.1, 2.0), "log"), ((-0.1, 2.0), "linear")])
def test_a_log_axis_needs_a_range(values, scale):
    found = axis("x", values)
    assert found.scale == scale
    assert len(found.ticks) >= 3


def test_curves_that_lie_on_one_another_are_told():
    of = axis("y", [0.0, 1.0])
    series = [Series("a", [1, 2], [0.5, 0.6]), Series("b", [1, 2], [0.501, 0.599]), Series("c", [1, 2], [0.1, 0.9])]
    assert draw.depths(series, of) == {"a": 1, "b": 0, "c": 0}


@pytest.mark.parametrize("name", ["perplexity", "losses", "across"])
def test_the_renderer_draws_every_point(name, monkeypatch):
    chart = CHARTS[name]
    made = draw.figure(chart)
    drawn = {
        (round(float(x), 6), round(float(y), 6))
        for axes in made.axes
        for line in axes.get_lines()
        for x, y in zip(line.get_xdata(), line.get_ydata())
    }
    for panel in chart.panels:
        for series in panel.series:
            for x, y in zip(series.x, series.y):
                assert x > panel.x.high or (round(x, 6), round(y, 6)) in drawn
    labels = [text.get_text() for axes in made.axes for text in axes.get_yticklabels()]
    labels += [text.get_text() for legend in made.legends for text in legend.get_texts()]
    assert {series.method for panel in chart.panels for series in panel.series} <= set(labels)
    plt.close(made)


def test_files(tmp_path):
    table = pd.Series({"a": Loss(-0.01, float("nan"), float("nan")), "b": Loss(0.2, 0.1, 0.3)})
    assert quality.losses(table, "tiny", tmp_path, "x-") == "x-losses.png"
    assert {file.name for file in tmp_path.iterdir()} == {"x-losses.png", "x-losses.svg"}


if __name__ == "__main__":
    KEPT.mkdir(parents=True, exist_ok=True)
    for name, chart in CHARTS.items():
        (KEPT / f"{name}.json").write_text(json.dumps(chart.as_dict(), indent=1) + "\n")
