"""Tables of a report, from frames made by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from resting.benchmarks.report import losses as analysis
from resting.benchmarks.report import tables

TEXTS = ["news", "tales"]
COUNT = {"news": 40, "tales": 10}
"""Windows a text: texts weigh the same whatever they have."""
BASE = {text: np.random.default_rng(5).normal(3.0, 0.5, n) for text, n in COUNT.items()}


def flat(text, seed=7):
    """Noise with mean 0 on every text, so that means are known by hand."""
    noise = np.random.default_rng(seed).normal(0.0, 1.0, COUNT[text])
    return noise - noise.mean()


def windows(losses, tokens="all", seed=0):
    """Rows of windows.parquet from {(method, target): {text: (loss, spread)}}; dense has loss 0."""
    rows = []
    for (method, target), by_text in ({("dense", 0.0): dict.fromkeys(TEXTS, (0.0, 0.0))} | losses).items():
        for text, (loss, spread) in by_text.items():
            values = BASE[text] + loss + spread * flat(text, len(method))
            rows += [
                {
                    "model": "tiny",
                    "method": method,
                    "target": target,
                    "seed": seed,
                    "tokens": tokens,
                    "metric": f"{text}_nll",
                    "window": i,
                    "value": value,
                }
                for i, value in enumerate(values)
            ]
    return pd.DataFrame(rows)


def both(loss, spread=0.0):
    return dict.fromkeys(TEXTS, (loss, spread))


def row(**changes):
    values = {
        "model": "tiny",
        "method": "teal",
        "target": 0.5,
        "byte_sparsity": 0.5,
        "seed": 0,
        "metric": "news_perplexity",
        "value": 20.0,
        "stderr": 1.0,
        "dataset": "news",
        "tokens": "all",
        "reason": None,
    }
    return values | changes


def frame(*rows):
    return pd.DataFrame([row(**changes) for changes in rows])


def read(table):
    """Headers and rows of a table."""
    assert all(len(row) == len(table.headers) for row in table.rows)
    return table.headers, table.rows


LOSSES = {
    ("good", 0.5): both(0.10, 0.02),
    ("near", 0.5): both(0.101, 0.05),
    ("bad", 0.5): both(0.30, 0.02),
    ("good", 0.25): both(0.08),
    ("bad", 0.25): both(0.02),
}


def test_losses_mark_the_best_and_its_ties():
    table = tables.losses(analysis.losses(windows(LOSSES), TEXTS), "A suite")
    assert table.title == "A suite"
    assert "**Bold**: the smallest of its column; ≈" in table.caption
    header, lines = read(table)
    assert header == ["", "0.25", "0.50"]
    cells = {line[0]: line[1:] for line in lines}
    assert list(cells) == ["good", "near", "bad"]  # in the order of the frame
    assert cells["good"][1].startswith("**0.100 [")
    assert cells["good"][1].endswith("]**")
    assert cells["near"][1].startswith("0.101 [")
    assert cells["near"][1].endswith("] ≈")
    assert cells["bad"][1].startswith("0.300 [")
    assert cells["bad"][1].endswith("]")
    assert cells["good"][0] == "0.080 [0.080, 0.080]"
    assert cells["bad"][0] == "**0.020 [0.020, 0.020]**"
    assert cells["near"][0] == ""
    inside = "".join(cell for line in lines for cell in line)
    assert inside.count("**") == 2 * 2
    assert inside.count("≈") == 1


def test_a_paired_difference_decides_on_a_tie():
    """Intervals overlap widely, but window by window the one is always above the other."""
    shaky = {("aaaa", 0.5): both(0.100, 0.3), ("bbbb", 0.5): both(0.101, 0.3)}  # same length: same noise
    table = tables.losses(analysis.losses(windows(shaky), TEXTS), "A suite")
    cells = {line[0]: line[1] for line in read(table)[1]}
    assert cells["aaaa"].startswith("**0.100")
    assert cells["bbbb"].startswith("0.101")
    assert "≈" not in cells["bbbb"]


def test_texts_weigh_the_same_and_seeds_are_averaged():
    table = analysis.losses(windows({("teal", 0.5): {"news": (0.1, 0.0), "tales": (0.3, 0.0)}}), TEXTS)
    assert table.loc["teal", 0.5].value == pytest.approx(0.2)
    seeds = [windows({("teal", 0.5): both(loss)}, seed=i) for i, loss in enumerate((0.1, 0.4))]
    assert analysis.losses(pd.concat(seeds), TEXTS).loc["teal", 0.5].value == pytest.approx(0.25)
    assert analysis.losses(windows({("teal", 0.5): both(0.1)}), ["news"]).loc["teal", 0.5].value == pytest.approx(0.1)


def test_the_interval_of_a_loss():
    """Against the normal interval of a mean over 40 and one over 10 windows, with equal weights."""
    loss = analysis.losses(windows({("teal", 0.5): both(0.1, 0.1)}), TEXTS).loc["teal", 0.5]
    variances = [(0.1 * flat(text, 4)).var() / n for text, n in COUNT.items()]
    half = 1.96 * np.sqrt(sum(variances)) / 2
    assert (loss.low, loss.high) == pytest.approx((0.1 - half, 0.1 + half), abs=0.15 * half)


def test_without_dense_there_are_no_losses():
    rows = windows(LOSSES)
    assert analysis.losses(rows[rows.method != "dense"], TEXTS).empty


def test_policies_rank():
    swapped = {("good", 0.5): both(0.05), ("near", 0.5): both(0.04), ("bad", 0.5): both(0.2)}
    rows = pd.concat([windows(LOSSES, "all"), windows(swapped | {("late", 0.5): both(0.01)}, "half")])
    title, *found = tables.policies(rows, TEXTS, ["all", "half"])
    assert title == "## Token policies"
    assert found[0].caption.startswith("Nats a token above the dense model")
    assert len(found) == 1  # 0.25 is not there under both
    header, lines = read(found[0])
    assert header == ["at 0.50", "all", "half"]
    cells = {line[0]: line[1:] for line in lines}
    assert set(cells) == {"good", "near", "bad"}  # late is not there under both
    assert [cells[m][0][-3:] for m in ("good", "near", "bad")] == ["(1)", "(2)", "(3)"]
    assert [cells[m][1][-3:] for m in ("good", "near", "bad")] == ["(2)", "(1)", "(3)"]
    assert cells["bad"][1].startswith("0.200 [")
    assert tables.policies(rows, TEXTS, ["all"]) == []
    assert tables.policies(rows, TEXTS, ["all", "none"]) == []


def test_allocations_are_means_by_projection():
    ratios = {"0.q": 0.2, "1.q": 0.4, "0.down": 0.75, "1.down": 0.5, "0.act": 0.1, "1.act": 0.1}
    title, table = tables.allocations(
        [
            {"method": "dense", "target": 0.0},
            {"method": "teal", "target": 0.5, "ratios": dict.fromkeys(ratios, 0.5)},
            {"method": "teal-greedy", "target": 0.5, "ratios": ratios},
            {"method": "teal-greedy", "target": 0.25, "ratios": {"0.q": 0.1, "0.up": 0.3}},
        ]
    )
    assert title == "## Allocation"
    header, lines = read(table)
    assert header == ["method", "target", "q", "up", "act", "down"]
    assert lines == [
        ["teal-greedy", "0.50", "0.30", "", "0.10", "0.62"],
        ["teal-greedy", "0.25", "0.10", "0.30", "", ""],
    ]
    assert tables.allocations([{"method": "teal", "target": 0.5, "ratios": {"0.q": 0.5, "0.up": 0.5}}]) == []


def test_splits_are_means_by_projection():
    rho = {"0.q": 0.8, "1.q": 1.0, "0.down": 0.5, "1.down": 0.7}
    cells = [{"method": "rsparse", "target": 0.5, "rho": 0.95}, {"method": "found", "target": 0.5, "rho": rho}]
    _, table = tables.splits(cells)
    assert read(table) == (["method", "target", "q", "down"], [["found", "0.50", "0.90", "0.60"]])
    assert tables.splits(cells[:1]) == []


def test_refined_thresholds_are_means_by_projection():
    factors = {"0.q": 0.8, "1.q": 1.2, "0.down": 1.1, "1.down": 1.3}
    cells = [{"method": "teal", "target": 0.5}, {"method": "fine", "target": 0.5, "threshold_factors": factors}]
    _, table = tables.refined(cells)
    assert read(table) == (["method", "target", "q", "down"], [["fine", "0.50", "1.00", "1.20"]])
    assert tables.refined(cells[:1]) == []


def test_biases_on_the_dense_model():
    rows = frame(
        {"method": "dense", "target": 0.0, "value": 15.0},
        {"method": "spon(teal)"},
        {"method": "spon(teal)", "metric": "news_perplexity_on_dense", "value": 14.5},
        {"method": "spon(teal)", "metric": "news_kl_on_dense", "value": 0.02},
    )
    header, lines = read(tables.on_dense(rows, TEXTS)[1])
    assert header == ["method", "target", "seed", "dataset", "dense", "with biases", "KL"]
    assert lines == [["spon(teal)", "0.50", "0", "news", "15.00", "14.50", "0.020"]]
    assert tables.on_dense(rows[:2], TEXTS) == []


def test_published_beside_measured():
    figure = {"model": "tiny", "method": "teal", "target": 0.5, "metric": "news_perplexity"}
    figure |= {"value": 5.22, "tag": "S", "source": "table 1"}
    figures = [
        figure,
        figure | {"target": 0.25},
        figure | {"model": "large"},
        figure | {"metric": "tales_perplexity"},
        figure | {"method": "cats"},
    ]
    measured = frame({"value": 20.0}, {"value": 21.5, "seed": 1}, {"method": "cats", "value": np.nan, "reason": "no"})
    title, table = tables.published(measured, figures)
    assert title == "## Published figures"
    assert "second hand" in table.caption
    header, lines = read(table)
    assert header == ["model", "method", "target", "metric", "published", "trust", "measured", "source"]
    assert lines[0] == ["tiny", "teal", "0.50", "news_perplexity", "5.22", "S", "20.75", "table 1"]
    assert [line[6] for line in lines[1:]] == ["not measured"] * 4
    assert tables.published(measured, []) == []


def test_sparsities_name_the_worst_distance():
    rows = frame(
        {"byte_sparsity": 0.5021},
        {"byte_sparsity": 0.49, "metric": "tales_perplexity", "dataset": "tales", "method": "cats"},
        {"byte_sparsity": 0.2512, "target": 0.25},
        {"byte_sparsity": 0.0, "target": 0.0, "method": "dense"},
        {"byte_sparsity": 0.9, "metric": "news_kl"},
        {"byte_sparsity": 0.9, "metric": "other_perplexity", "dataset": "other"},
    )
    title, table = tables.sparsities(rows, rows[:0], TEXTS)
    assert title == "## Measured byte sparsity"
    assert (
        table.caption == "On the evaluation text. The largest distance from a target is 0.0100 (cats at 0.5 on tales)."
    )
    header, lines = read(table)
    assert header == ["method", "dataset", "0.25", "0.50"]
    assert lines == [["teal", "news", "0.2512", "0.5021"], ["cats", "tales", "", "0.4900"]]
    assert tables.sparsities(rows[rows.target == 0], rows[:0], TEXTS) == []


def test_sparsities_under_further_policies_are_ranges_over_texts():
    further = frame(
        {"byte_sparsity": 0.503, "tokens": "half"},
        {"byte_sparsity": 0.512, "tokens": "half", "metric": "tales_perplexity", "dataset": "tales"},
        {"byte_sparsity": 0.499, "tokens": "tenth", "method": "cats"},
    )
    *_, table = tables.sparsities(frame({"byte_sparsity": 0.501}), further, TEXTS)
    assert "0.0120 (teal at 0.5 on tales)" in table.caption
    header, lines = read(table)
    assert header == ["method", "target", "half", "tenth"]
    assert lines == [["teal", "0.50", "0.5030 to 0.5120", ""], ["cats", "0.50", "", "0.4990 to 0.4990"]]


def test_reasons_stand_in_one_line_for_all_metrics():
    missing = {"method": "cats", "target": 0.65, "value": np.nan, "reason": "above its ceiling"}
    rows = frame({}, missing, missing | {"metric": "tales_kl", "dataset": "tales"}, {"reason": "far off"})
    title, table, second, off = tables.reasons(rows)
    assert (title, second) == ("## Not measured", "## Off target")
    assert read(table)[1] == [["cats", "0.65", "news, tales", "above its ceiling"]]
    assert read(off)[1] == [["teal", "0.50", "news", "far off"]]
    assert tables.reasons(rows[:1]) == []


@pytest.mark.parametrize(
    ("values", "stderrs", "shown"),
    [
        ([20.123], [1.049], "20.12 ± 1.05"),
        ([1.23456], [0.0123], "1.235 ± 0.012"),
        ([1234.5], [56.7], "1234 ± 57"),
        ([20.0, 21.0], [1.2, 1.2], "20.50 ± 1.30"),  # over windows, and 0.50 over seeds
        ([20.0], [np.nan], "20.00"),
        ([5.6e11], [1.2e12], "5.6e+11"),
    ],
)
def test_cells_of_values(values, stderrs, shown):
    rows = [{"value": v, "stderr": s, "seed": i} for i, (v, s) in enumerate(zip(values, stderrs))]
    rows += [{"method": "dense", "target": 0.0, "value": 15.0, "stderr": 0.5}]
    rows += [{"method": "cats", "target": 0.25, "value": 16.0}, {"method": "cats", "value": np.nan}]
    header, lines = read(tables.values(frame(*rows), "news_perplexity", "news", "Perplexity."))
    assert header == ["", "0.25", "0.50"]
    assert {line[0]: line[1:] for line in lines} == {
        "teal": ["", shown],
        "dense": ["15.00 ± 0.50"] * 2,
        "cats": ["16.00 ± 1.00", ""],
    }


def test_the_dense_model_alone_is_a_table():
    table = tables.values(frame({"method": "dense", "target": 0.0, "value": 15.0}), "news_perplexity", "news", "")
    assert read(table) == (["", ""], [["dense", "15.00 ± 1.00"]])
    assert r"dense & 15.00 $\pm$ 1.00" in table.latex()


def test_folded_beside_its_plan():
    rows = frame(
        {"value": 20.0, "method": "spon(teal)"},
        {"value": 20.25, "method": "spon(teal)", "metric": "news_perplexity_folded"},
        {"value": 19.0, "method": "spon(teal)", "target": 0.25},
    )
    header, lines = read(tables.folded(rows, TEXTS)[1])
    assert header == ["method", "target", "dataset", "plan", "folded", "difference"]
    assert lines == [["spon(teal)", "0.50", "news", "20.0000", "20.2500", "+0.2500"]]
    assert tables.folded(rows[rows.metric == "news_perplexity"], TEXTS) == []


def test_a_loss_that_is_not_a_number_is_never_the_best():
    losses = {("broken", 0.5): both(np.nan), ("bad", 0.5): both(0.3), ("good", 0.5): both(0.1)}
    cells = {line[0]: line[1] for line in read(tables.losses(analysis.losses(windows(losses), TEXTS), "x"))[1]}
    assert cells["good"].startswith("**")
    assert not cells["broken"].startswith("**")


def test_a_loss_that_is_not_a_number_ranks_last():
    losses = {("bad", 0.5): both(0.3), ("broken", 0.5): both(np.nan), ("good", 0.5): both(0.1)}
    rows = pd.concat([windows(losses, "all"), windows(losses, "half")])
    ranks = {line[0]: line[1][-3:] for line in read(tables.policies(rows, TEXTS, ["all", "half"])[1])[1]}
    assert ranks == {"good": "(1)", "bad": "(2)", "broken": "(3)"}


def test_folded_beside_its_plan_under_the_same_policy():
    rows = frame(
        *({"value": v, "method": "spon(teal)", "tokens": t} for v, t in ((20.0, "all"), (10.0, "half"))),
        {"value": 10.5, "method": "spon(teal)", "tokens": "half", "metric": "news_perplexity_folded"},
    )
    assert read(tables.folded(rows, TEXTS)[1])[1][0][-1] == "+0.5000"


def test_splits_of_different_projections():
    rho = {"0.q": 0.5, "0.down": 0.6}
    _, table = tables.splits(
        [{"method": "a", "target": 0.5, "rho": rho}, {"method": "b", "target": 0.5, "rho": {"0.down": 0.1}}]
    )
    assert read(table) == (
        ["method", "target", "q", "down"],
        [["a", "0.50", "0.50", "0.60"], ["b", "0.50", "", "0.10"]],
    )
