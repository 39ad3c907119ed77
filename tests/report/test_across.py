"""Results folders side by side: numbers against sums by hand, what is refused, and what the picture shows."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st
from results_folder import DENSE, folder_with, row, windows
from scipy import stats

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.report.across import changes, joined
from resting.benchmarks.report.across.write import write
from resting.benchmarks.report.plots import across as plots
from resting.benchmarks.sweep import output

WRAPPED = "spon(teal)"
RIPPLE = 0.02 * np.cos(np.arange(len(DENSE)))
RIPPLE -= RIPPLE.mean()
METHODS = [{"name": name, "label": None, "parameters": {}} for name in ("dense", "teal", "cats", WRAPPED)]


def measured(
    path, name="small", sha="1", size=100_000_000, teal=0.4, wrapped=(0.1, 0.2, 0.3), change=None, more=(), bare=0.5
):
    """Write a folder with one model, whose wrapped method has one loss for every seed; `more` methods lose 4 nats."""
    rows = [row("dense", 10.0, 0.0, 0.0), row("teal", 15.0, bare)]
    singles = [windows({("teal", 0.5): teal + RIPPLE} | {(method, 0.5): 4.0 for method in more})]
    rows += [row(method, 500.0) for method in more]
    for seed, loss in enumerate(wrapped):
        rows.append(row(WRAPPED, 12.0, seed=seed))
        singles.append(windows({(WRAPPED, 0.5): loss}, seed=seed).query("target > 0"))
    frame = pd.concat(singles).assign(model=name)
    models = [{"name": name, "sha256": sha * 64}]
    folder = folder_with(path, [one | {"model": name} for one in rows], frame, models, "mine")
    facts = json.loads((folder / "provenance.json").read_text())
    facts["suite"] |= {"methods": METHODS, "reference": "teal"}
    if size is not None:
        dense = next(cell for cell in facts["cells"] if cell["method"] == "dense")
        dense |= {"reads": {"elements": size, "stored": size, "can_rest": 1.0}, "begins_with": ["<s>"]}
    if change is not None:
        change(facts)
    (folder / "provenance.json").write_text(json.dumps(facts))
    return folder


def of_length(path, tokens, **more):
    """Write a folder of the same model on windows of `tokens`."""

    def change(facts):
        facts["suite"]["evaluation"]["window"] = tokens
        facts["suite"]["name"] = f"lengths-{tokens}"

    return measured(path, change=change, **more)


def three(tmp_path):
    """Three models, given in another order than that of their sizes."""
    return [
        measured(tmp_path / "b", "middle", "2", 300_000_000, 0.3, (0.1, 0.1, 0.1)),
        measured(tmp_path / "c", "large", "3", 1_000_000_000, 0.2, (0.15, 0.16, 0.17)),
        measured(tmp_path / "a"),
    ]


def tables(folder):
    """Cells of every table of the README, by the first header and then by method."""
    found, lines = {}, (folder / "README.md").read_text().splitlines()
    for line in lines:
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if not cells or cells[0].startswith("--"):
            continue
        if cells[0].startswith("at "):
            name = cells[0] if cells[0] not in found else f"shares {cells[0]}"
            found[name] = {"": cells[1:]}
        elif found:
            found[name][cells[0]] = cells[1:]
    return found


def test_losses_shares_and_changes_by_size(tmp_path):
    folder = write(three(tmp_path), tmp_path / "out")
    found = tables(folder)
    losses, shares = found["at 0.50"], found["shares at 0.50"]
    assert losses[""] == ["small", "middle", "large", "largest less smallest"]
    assert [cell.strip("*").split(" ")[0] for cell in losses["teal"][:3]] == ["0.400", "0.300", "0.200"]
    assert [cell.strip("*").split(" ")[0] for cell in losses[WRAPPED][:3]] == ["0.200", "0.100", "0.160"]
    assert losses["teal"][3].startswith("-0.200 [")
    assert losses["teal"][3].endswith(", falls")
    assert list(shares) == ["", WRAPPED]
    assert [cell.split(" ")[0] for cell in shares[WRAPPED][:3]] == ["50", "67", "20"]
    assert shares[WRAPPED][3].startswith("-30 [")
    numbers = pd.read_csv(folder / "across.csv").set_index(["model", "method"])
    assert numbers.loc[("small", WRAPPED), "share"] == pytest.approx(1 - 0.2 / 0.4)
    assert numbers.loc[("large", WRAPPED), ["weights_in_blocks", "seeds"]].tolist() == [1_000_000_000, 3]
    assert (folder / "losses.png").stat().st_size > 10_000
    assert (folder / "shares.svg").exists()
    text = (folder / "README.md").read_text()
    assert "Several seeds have spon(teal) (3)" in text
    assert "What says *measured*" not in text
    assert "[c](../c/README.md)" in text
    assert "`<s>`" in text


def test_the_interval_of_a_share_against_one_drawn_here(tmp_path):
    """Windows are resampled, and the mean of three seeds has an error with Student's t of two degrees of freedom."""
    folder = write(three(tmp_path), tmp_path / "out")
    random, draws = np.random.default_rng(8), 400_000
    places = random.integers(len(RIPPLE), size=(draws, len(RIPPLE)))
    reference = 0.4 + RIPPLE[places].mean(1)
    error = stats.t.rvs(2, size=draws, random_state=random) * np.std([0.1, 0.2, 0.3], ddof=1) / np.sqrt(3)
    expected = np.quantile(1 - (0.2 + error) / reference, [0.025, 0.975])
    found = pd.read_csv(folder / "across.csv").set_index(["model", "method"]).loc[("small", WRAPPED)]
    assert [found.share_low, found.share_high] == pytest.approx(expected, abs=0.02 * (expected[1] - expected[0]))


def test_losses_by_length(tmp_path):
    folders = [of_length(tmp_path / str(n), n, teal=0.1 * i) for i, n in enumerate((4096, 512, 2048), 1)]
    folder = write(folders, tmp_path / "out")
    losses = tables(folder)["at 0.50"]
    assert losses[""] == ["512", "2,048", "4,096", "longest less shortest"]
    assert [cell.strip("*").split(" ")[0] for cell in losses["teal"][:3]] == ["0.200", "0.300", "0.100"]
    assert losses["teal"][3].endswith(", goes both ways")
    assert "The model is small." in (folder / "README.md").read_text()


def test_one_seed_is_said(tmp_path):
    folders = [measured(tmp_path / name, name, name, size, wrapped=(0.2,)) for name, size in (("a", 10), ("b", 20))]
    text = (write(folders, tmp_path / "out") / "README.md").read_text()
    assert "No method has several seeds: the spread between trainings is in no interval." in text


def test_a_method_that_one_folder_lacks_and_one_that_loses_too_much(tmp_path):
    folders = [measured(tmp_path / "a"), measured(tmp_path / "b", "large", "2", 200_000_000, more=["cats"])]
    folder = write(folders, tmp_path / "out")
    losses = tables(folder)["at 0.50"]
    assert losses["cats"][0] == "-"
    assert losses["cats"][2] == ""
    assert "cats" not in tables(folder)["shares at 0.50"]
    assert "Above 3, and not drawn: cats at 0.50 of large" in re.sub(r"\s+", " ", svg_text(folder / "losses.svg"))


def test_a_share_of_a_loss_that_is_not_ranked_is_not_either(tmp_path):
    """Where TEAL reads other bytes than its target says, its loss and what is said to be won back are no measure."""
    folders = [measured(tmp_path / "a"), measured(tmp_path / "b", "large", "2", 200_000_000, bare=0.4)]
    folder = write(folders, tmp_path / "out")
    losses, shares = tables(folder)["at 0.50"], tables(folder)["shares at 0.50"]
    assert losses["teal"][1].endswith("(measured 0.40)")
    assert "What says *measured* left other bytes unread" in (folder / "README.md").read_text()
    assert losses["teal"][2] == ""
    assert shares[WRAPPED][1].startswith("50 % [")
    assert shares[WRAPPED][1].endswith("(teal: measured 0.40)")
    assert shares[WRAPPED][2] == ""
    both = [measured(tmp_path / n, n, n, i + 1, bare=0.4) for i, n in enumerate("cd")]
    assert not (write(both, tmp_path / "none") / "shares.png").exists()
    assert (tmp_path / "none" / "losses.png").exists()
    rows = pd.read_csv(tmp_path / "none" / "across.csv").set_index(["model", "method"])
    assert rows.loc[("c", WRAPPED), "reason"] == "teal: measured 0.40"


def svg_text(file):
    """The note of a picture stands in comments of matplotlib's SVG, line by line."""
    return " ".join(re.findall(r"<!-- (.*?) -->", file.read_text(), re.DOTALL))


def setting(*names, value):
    def change(facts):
        of = facts["suite"]
        for name in names[:-1]:
            of = of[name]
        of[names[-1]] = value

    return change


OTHERS = {
    "dtype (float32 and bfloat16)": setting("dtype", value="bfloat16"),
    "bos (not said and always)": setting("bos", value="always"),
    "evaluation.windows (3 and 64)": setting("evaluation", "windows", value=64),
    "evaluation.scored (not said and 256)": setting("evaluation", "scored", value=256),
    "calibration.text (news and code)": setting("calibration", "text", value="code"),
    "tokens.n (1 and 4)": setting("tokens", "n", value=4),
    "reference (teal and cats)": setting("reference", value="cats"),
    "method spon(teal), parameters ({} and {'steps': 60})": setting("methods", 3, "parameters", value={"steps": 60}),
    "the data wikitext2 (not said and 0123)": lambda facts: facts["assets"].update(wikitext2="0123"),
}


@pytest.mark.parametrize("said", OTHERS)
def test_another_protocol_is_refused(tmp_path, monkeypatch, capsys, said):
    a, b = measured(tmp_path / "a"), measured(tmp_path / "b", "large", "2", change=OTHERS[said])
    assert tiny.resting(monkeypatch, "across", str(a), str(b), "--into", str(tmp_path / "out")) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert f"{a} and {b} differ in {said}; allowed: results of one protocol" in error
    assert not (tmp_path / "out").exists()


def test_what_no_number_depends_on_may_differ(tmp_path, monkeypatch, capsys):
    def change(facts):
        facts["suite"]["evaluation"]["batch_size"] = 2
        facts["suite"]["name"], facts["suite"]["targets"] = "another", [0.5]
        facts["suite"]["methods"] = [*METHODS[:3], METHODS[3] | {"seeds": [0]}]

    a, b = measured(tmp_path / "a"), measured(tmp_path / "b", "large", "2", 10**9, wrapped=(0.2,), change=change)
    assert tiny.resting(monkeypatch, "across", str(a), str(b), "--into", str(tmp_path / "out")) == 0
    assert "spon(teal) (3, 1 by column)" in capsys.readouterr().out


def no_text(facts):
    facts["suite"]["evaluation"]["texts"] = []


def two_texts(facts):
    facts["suite"]["evaluation"]["texts"] = ["news", "tales"]


def in_codes(facts):
    facts["models"][0]["stored_as"] = "int4-g64"


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"sha": "1"}, "hold the same model (small) on windows of 16 tokens; allowed: each once"),
        ({"size": None}, "b does not say how many weights large has"),
        ({"change": no_text}, "b has losses on no text"),
        ({"change": in_codes}, "b has weights in int4-g64; allowed: weights as they are"),
        ({"change": setting("evaluation", "window", value=32)}, "allowed: one of both"),
        ({"change": lambda facts: facts.pop("machines")}, "b holds no results of a suite as this version writes them"),
    ],
)
def test_what_has_no_order_is_refused(tmp_path, second, said):
    a = measured(tmp_path / "a")
    name = "small" if second.get("sha") == "1" else "large"
    b = measured(tmp_path / "b", **{"name": name, "sha": "2"} | second)
    with pytest.raises(BenchmarkError, match=re.escape(said)):
        write([a, b], tmp_path / "out")


def test_one_folder_and_one_twice_are_refused(tmp_path):
    a = measured(tmp_path / "a")
    with pytest.raises(BenchmarkError, match="a alone: there is nothing to join"):
        joined.read([a])
    with pytest.raises(BenchmarkError, match="name one folder twice"):
        joined.read([a, tmp_path / "out" / ".." / "a"])


def test_a_text_without_numbers_is_refused(tmp_path):
    folders = [measured(tmp_path / n, n, n, i + 1, change=two_texts) for i, n in enumerate("ab")]
    with pytest.raises(BenchmarkError, match="a has no loss of a on tales"):
        joined.read(folders)


def test_results_are_not_written_over(tmp_path):
    folders = three(tmp_path)
    with pytest.raises(BenchmarkError, match=r"holds results \(results.csv\), whose README.md would be replaced"):
        write(folders, folders[0])
    out = write(folders, tmp_path / "out")
    assert write(folders, out) == out
    with pytest.raises(BenchmarkError, match=r"sets other results side by side \(across.csv\)"):
        output.check(out, "mine", {"1" * 12: "small"}, "float32")


ENDS = st.tuples(st.floats(-5, 5), st.floats(0, 2), st.floats(0, 2)).map(lambda v: (v[0], v[0] - v[1], v[0] + v[2]))


@given(ENDS, ENDS)
def test_a_change_is_the_other_way_round_backwards(first, last):
    there, back = changes.change(first, last), changes.change(last, first)
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))
    assert there.low <= there.value <= there.high


def test_a_change_of_normal_numbers_has_the_normal_interval():
    half = math.hypot(0.3, 0.4)
    found = changes.change((1.0, 0.7, 1.3), (3.0, 2.6, 3.4))
    assert (found.value, found.low, found.high) == pytest.approx((2.0, 2.0 - half, 2.0 + half))


@pytest.mark.parametrize(
    ("values", "way"),
    [
        ((0.59, 0.66), "grows"),
        ((0.66, 0.62, 0.59), "falls"),
        ((0.59, 0.60, 0.58), "holds within noise"),
        ((0.59, 0.66, 0.41), "goes both ways"),
        ((0.59, 0.61, 0.60, 0.66), "grows"),
    ],
)
def test_directions(values, way):
    assert changes.direction([(value, value - 0.02, value + 0.02) for value in values]) == way


def test_without_intervals_there_is_no_direction():
    assert changes.direction([(0.5, math.nan, math.nan), (0.6, 0.5, 0.7)]) == "no interval"


def chart(x):
    values = {0.5: {"teal": [(0.4, 0.3, 0.5)] * len(x), "was": [(5.0, 4.0, 6.0), *[(0.3, 0.2, 0.4)] * (len(x) - 1)]}}
    return plots.chart(values, [(v, f"m {v}") for v in x], "x", "y", "t", 3.0)


def test_places_are_logarithms_where_they_stand_apart():
    (panel,) = chart([512, 2048, 4096]).panels
    assert panel.x.ticks == pytest.approx(np.log10([512, 2048, 4096]))
    assert panel.x.label == "x (log scale)"
    (panel,) = chart([100, 106, 1300]).panels
    assert panel.x.ticks == [0.0, 1.0, 2.0]
    assert panel.x.label == "x (evenly spaced)"
    assert chart([7, 7]).panels[0].x.ticks == [0.0, 1.0]


def test_methods_of_one_place_stand_side_by_side():
    made = chart([100, 106, 1300])
    teal, was = made.panels[0].series
    assert len(teal.x) == 3
    assert len(was.x) == 2
    assert was.x[0] - teal.x[1] == pytest.approx(plots.CLUSTER / 2)
    assert "was at 0.50 of m 100 (5.0)" in made.note
