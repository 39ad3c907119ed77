"""A row that is not as sparse as its target says is the best of nothing, and says why."""

from __future__ import annotations

import re

import numpy as np
import pandas as pd
import pytest
from page_folder import RESULTS
from results_folder import folder_with, row, windows

from resting.benchmarks.cells import ranking
from resting.benchmarks.page import collect, marks
from resting.benchmarks.report import folder as folders
from resting.benchmarks.report import losses, sections, tables
from resting.benchmarks.report.compared import quality_against_time
from resting.benchmarks.report.plots import quality as plots

NEAR = 0.5 + ranking.TOLERANCE - 0.001
FAR = 0.5 + ranking.TOLERANCE + 0.001


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (row("teal", 9.0), ""),
        (row("teal", 9.0, NEAR), ""),
        (row("teal", 9.0, FAR), "measured 0.53"),
        (row("teal", 9.0, 0.0), "measured 0.00"),
        (row("teal", 0.0, metric="news_kl"), "its KL is 0, as the dense model's"),
        (row("teal", 1e-9, metric="news_kl"), ""),
        (row("dense", 0.0, 0.0, 0.0, "news_kl"), ""),
        (row("dense", 9.0, 0.0, 0.0), ""),
        (row("teal", np.nan, 0.0), ""),
        (row("spon(teal)", 9.0, -0.001, metric="news_perplexity_on_dense"), ""),
    ],
)
def test_what_is_not_ranked(row, reason):
    assert ranking.reasons(pd.DataFrame([row])) == [reason]
    assert ranking.unranked(pd.DataFrame([row])) == ({(row["method"], 0.5): reason} if reason else {})


def test_the_text_that_is_off_is_named_where_others_are_not():
    rows = [row("teal", 9.0, FAR), row("teal", 9.0) | {"dataset": "code", "metric": "code_perplexity"}]
    assert ranking.unranked(pd.DataFrame(rows)) == {("teal", 0.5): f"measured 0.53 on {rows[0]['dataset']}"}
    both = [rows[0], rows[1] | {"byte_sparsity": FAR}]
    assert ranking.unranked(pd.DataFrame(both)) == {("teal", 0.5): "measured 0.53"}


def test_no_committed_row_is_off_its_target():
    for file in RESULTS.rglob("results.csv"):
        frame = pd.read_csv(file)
        if {"tokens", "metric"} <= set(frame):
            assert not any(ranking.reasons(frame)), file


def test_a_dense_model_that_calls_itself_sparse_is_not_the_best():
    frame = pd.DataFrame([row("plain", 20.0, 0.0), row("teal", 22.0), row("cats", 25.0)])
    of = windows({("plain", 0.5): 0.0, ("teal", 0.5): 0.1, ("cats", 0.5): 0.2})
    table = losses.losses(of, ["news"], ranking.unranked(frame))
    cells = tables.losses(table, "A suite").rows
    assert [cell for cell in cells if "**" in cell[1]] == [["teal", "**0.100 [0.100, 0.100]**"]]
    assert ["plain", "0.000 [0.000, 0.000] (measured 0.00)"] in cells
    title, listed = tables.not_ranked(frame)
    assert title == "## Not ranked"
    assert listed.rows == [["plain", "0.50", "news", "all-but-first-1", "measured 0.00"]]
    old = losses.losses(of, ["news"])
    assert old.loc["plain", 0.5].best  # the loss alone does not tell


def test_ranks_under_policies_leave_it_out():
    frame = pd.DataFrame([row("plain", 20.0, 0.0), row("teal", 22.0), row("cats", 25.0)])
    of = windows({("plain", 0.5): 0.0, ("teal", 0.5): 0.1, ("cats", 0.5): 0.2})
    both = ["all-but-first-1", "half"]
    of, frame = (pd.concat([part, part.assign(tokens="half")]) for part in (of, frame))
    _, table = tables.policies(of, ["news"], both, frame)
    ranks = {line[0]: line[1].rsplit(" ", 1)[1] for line in table.rows}
    assert ranks == {"plain": "(-)", "teal": "(1)", "cats": "(2)"}


def test_a_seed_without_a_number_is_not_left_out_of_a_mean():
    two = pd.concat([windows({("spon", 0.5): 0.1, ("teal", 0.5): 0.3}), windows({("spon", 0.5): np.nan}, seed=1)])
    two = two[~((two.method == "dense") & (two.seed == 1))]
    rows = [row("spon", 20.0), row("spon", np.nan, seed=1, reason="diverged: the value is inf"), row("teal", 30.0)]
    frame = pd.DataFrame(rows)
    table = losses.losses(two, ["news"], ranking.unranked(frame))
    assert str(table.loc["spon", 0.5]) == "- (1 of 2 seeds have no number on news)"
    assert table.loc["teal", 0.5].best
    shown = tables.values(frame, "news_perplexity", "news", "")
    assert shown.rows[0] == ["spon", "20.00 ± 0.10 (1 of 2 seeds without)"]


ROWS = [
    row("dense", 10.0, 0.0, 0.0),
    row("plain", 10.0, 0.0),
    row("teal", 11.0),
    row("cats", 12.0),
]


def test_neither_page_nor_plot_nor_table_has_it_for_the_best(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "losses", lambda table, *_: drawn.append(list(table.index)) or "losses.png")
    of = windows({("plain", 0.5): 0.0, ("teal", 0.5): 0.1, ("cats", 0.5): 0.2})
    folder = folder_with(tmp_path / "mine", ROWS, of)
    sections.write(folder)
    text = (folder / "README.md").read_text()
    assert re.search(r"\| teal +\| \*\*0\.100", text)
    assert "(measured 0.00)" in text
    assert "## Not ranked" in text
    assert drawn == [["teal", "cats"]]
    marked = marks.add(collect.folders(tmp_path)[0]).set_index("method")
    assert marked.mark.to_dict() == {"dense": 0, "plain": 0, "teal": marks.BEST, "cats": 0}
    assert marked.reason["plain"] == "not ranked: measured 0.00"
    assert pd.isna(marked.reason["teal"])


def test_two_folders_with_models_of_one_name_are_two_on_the_page(tmp_path):
    for number, name in enumerate(("one", "two")):
        models = [{"name": "tiny", "sha256": str(number) * 64}]
        folder_with(tmp_path / name, ROWS, windows({("teal", 0.5): 0.1}), models, name)
    found = collect.folders(tmp_path)
    assert [set(folder.rows.model) for folder in found] == [{"tiny@000000000000"}, {"tiny@111111111111"}]
    for folder in found:
        assert set(folder.singles.model) == set(folder.rows.model) == {cell["model"] for cell in folder.facts["cells"]}
        assert marks.add(folder).loss.notna().any()  # singles are found under the new name, too


def test_older_results_take_their_weights_from_provenance(tmp_path):
    folder = folder_with(tmp_path / "old", ROWS, models=[{"name": "tiny", "sha256": "1234567890ab" * 5}])
    assert set(folders.read_results(folder).weights) == {"1234567890ab"}
    (folder / "provenance.json").unlink()
    assert folders.read_results(folder).weights.isna().all()


def test_a_hash_of_digits_alone_stays_text(tmp_path):
    folder = folder_with(tmp_path / "digits", [one | {"weights": "012345678901"} for one in ROWS])
    assert set(folders.read_results(folder).weights) == {"012345678901"}


@pytest.mark.parametrize(
    ("rows", "models", "said"),
    [
        (ROWS, [{"name": "tiny", "sha256": "0" * 64}, {"name": "tiny", "sha256": "1" * 64}], "two models called tiny"),
        (
            [one | {"weights": str(i) * 12} for i, one in enumerate(ROWS[:2])],
            None,
            "rows of tiny with weights 000000000000, 111111111111; allowed: one a name",
        ),
        ([ROWS[0], ROWS[1] | {"dtype": "bfloat16"}], None, "rows of tiny with dtype float32, bfloat16; allowed: one"),
    ],
)
def test_rows_of_two_models_or_dtypes_under_one_name_are_refused(tmp_path, rows, models, said):
    folder = folder_with(tmp_path / "both", rows, models=models)
    with pytest.raises(folders.BenchmarkError, match=said):
        folders.read_results(folder)


def test_a_time_is_joined_with_the_quality_of_the_same_weights():
    good = pd.DataFrame([row("dense", 10.0, 0.0, 0.0), row("teal", 11.0)]).assign(weights="0" * 12)
    good["metric"], good["dataset"] = "papers_perplexity", "papers"
    timed = {"method": "teal", "target": 0.5, "speedup": 1.5}

    def of(**changes):
        found = quality_against_time.join(pd.DataFrame([timed | changes]), good)
        return list(found.of) if len(found) else []

    assert of(model="tiny", weights="0" * 12) == ["tiny"]
    assert of(model="b/tiny", weights="0" * 12) == ["tiny"]  # the same weights under another name
    assert of(model="tiny", weights="1" * 12) == []  # other weights under the same name
    assert of(model="a shape (random weights)", weights="random") == ["tiny"]
    assert of(model="tiny") == ["tiny"]  # timed before rows named weights


def test_quality_in_a_format_is_above_the_dense_model_as_it_is():
    """What a step from codes is faster than is the dense model as it is: losses are above the same one."""
    plain = [row("dense", 10.0, 0.0, 0.0) | {"weights": "0" * 12}, row("teal", 11.0) | {"weights": "0" * 12}]
    coded = [one | {"model": "tiny (int4-g32)", "weights": "1" * 12, "value": 2 * one["value"]} for one in plain]
    good = pd.DataFrame([*plain, *coded]).assign(metric="papers_perplexity", dataset="papers")
    timed = {"method": "teal", "target": 0.5, "speedup": 1.5, "model": "tiny (int4-g32)", "weight_format": "int4-g32"}

    def found(frame, **changes):
        joined = quality_against_time.join(pd.DataFrame([timed | changes]), frame)
        return [(one.of, round(one.nats, 6)) for one in joined.itertuples()]

    expected = [("tiny (int4-g32)", round(float(np.log(2.2)), 6))]
    assert found(good, weights="1" * 12) == expected
    assert found(good, weights="random", model="a shape (random weights, then int4-g32)") == expected
    only_plain = good[good.weights == "0" * 12]
    for weights in ("1" * 12, "random"):
        assert found(only_plain, weights=weights) == []  # quality in that format was not measured
    assert found(good[good.weights == "1" * 12], weights="1" * 12) == []  # nor was the model as it is
