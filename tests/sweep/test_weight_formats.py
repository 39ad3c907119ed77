"""Weight formats as an axis: rows, keys, refusals, what is verified, and the report."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
from two_models import rows_of

from resting.benchmarks import run
from resting.benchmarks.assets import models
from resting.benchmarks.cells import expand, registry, suite_file
from resting.benchmarks.cells.cell import COLUMNS, STORED
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import TasksConfig
from resting.benchmarks.checks import verify
from resting.benchmarks.errors import BenchmarkError, ModelError
from resting.benchmarks.names import short, with_format, with_weights, without_format
from resting.benchmarks.progress import Console
from resting.benchmarks.quality import perplexity, plans
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.weight_formats import in_formats
from resting.benchmarks.report import sections
from resting.benchmarks.report.compared import weights
from resting.benchmarks.report.compared.literature import is_counterpart
from resting.benchmarks.report.plots.bits import Point, chart, front
from resting.benchmarks.sweep.jobs import jobs_of
from resting.benchmarks.sweep.mode import Mode
from resting.sparsifier import PlanError
from resting.sparsifier.quantised.formats import bits_a_weight

FORMATS = ["as-is", "int8-g8", "int4-g16"]
METHODS = '[[methods]]\nname = "rsparse"\n[[methods]]\nname = "larosa"\n[[methods]]\nname = "mean-error(teal)"\n'


@pytest.fixture
def suite(here):
    (here / "mine.toml").write_text(
        tiny.SUITE.replace("targets = [0.5]", f'model = "a/model"\ntargets = [0.3, 0.4]\nweights = {FORMATS}') + METHODS
    )
    return suite_file.load("mine.toml")


def test_every_format_is_a_model_of_its_own_and_rows_say_what_is_read(suite, here):
    folder = run.run(suite, Options(here / "out"), Console(quiet=True))
    rows = rows_of(folder)
    assert list(rows) == [*COLUMNS, *STORED]
    assert list(rows.weight_format.unique()) == FORMATS
    assert list(rows.model.unique()) == ["model", "model (int8-g8)", "model (int4-g16)"]
    assert rows.weights.nunique() == 3
    assert (rows.bits_a_weight == rows.weight_format.map(bits_a_weight)).all()
    scored = rows[rows.value.notna()]
    plain = scored[scored.method.isin(["dense", "teal"])]
    assert (plain.bits_read - plain.bits_a_weight * (1 - plain.byte_sparsity)).abs().max() < 1e-5
    added = scored[scored.method.isin(["rsparse", "mean-error(teal)"]) & (scored.weight_format != "as-is")]
    assert (added.bits_read > added.bits_a_weight * (1 - added.byte_sparsity)).all()
    dense = scored[(scored.method == "dense") & (scored.metric == "wikipedia_perplexity")]
    assert dense.value.nunique() == 3
    refused = rows[(rows.method == "larosa") & (rows.weight_format != "as-is")]
    assert refused.value.isna().all()
    assert refused.reason.str.contains("rewrites the model: its matrices would not be those stored as").all()
    assert scored[(scored.method == "larosa")].weight_format.unique() == ["as-is"]
    facts = json.loads((folder / "provenance.json").read_text())
    assert [model.get("stored_as", "as-is") for model in facts["models"]] == FORMATS
    again = verify.verify(folder, Options(here / "out"), 8, 0, 0.0, Console(quiet=True))
    assert all(one.agrees for one in again)
    for seed in range(3):  # cells that were refused are not among those that are measured again
        assert verify.verify(folder, Options(here / "out"), 1, seed, 0.0, Console(quiet=True))
    said = (folder / "README.md").read_text()
    assert "## Bits read" in said
    assert said.index("## Bits read") < said.index("# model (int8-g8)")
    assert "nothing at rest" in said
    assert (folder / "bits.png").is_file()
    table = pd.read_csv(folder / "tables" / "01-bits-read.csv")
    assert list(table)[1:] == [*FORMATS, "nothing at rest"]
    sections.write(folder)
    assert (folder / "README.md").read_text() == said


def test_codes_that_make_up_for_errors_are_found_on_the_calibration_text(here, monkeypatch, capsys):
    formats = "as-is,int3-g16,int3-g16-gptq"
    assert (
        tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model", "--weights", formats, "--name", "codes")
        == 0
    )
    rows = rows_of(here / "results" / "codes-model")
    dense = rows[(rows.method == "dense") & (rows.metric == "wikipedia_perplexity")].set_index("weight_format").value
    assert dense.nunique() == 3
    again = rows[(rows.method == "teal")].groupby("weight_format").bits_read.mean()
    assert abs(again["int3-g16"] - again["int3-g16-gptq"]) < 0.2


def test_as_is_is_what_it_was(suite, here):
    """Neither keys nor files of a suite without formats, or with weights as they are, know of the axis."""
    plain = suite.model_copy(update={"weights": ["as-is"]})
    source = models.resolve("a/model")
    (alone,) = in_formats([source], ["as-is"])
    assert alone == source
    keys = [
        [
            key
            for job in jobs_of(of, expand.cells_of(of), Options(here), in_formats([source], of.weights), {}, Mode.FORCE)
            for key, _ in job.cells
        ]
        for of in (plain, suite)
    ]
    assert keys[0] == keys[1][: len(keys[0])]
    assert len(set(keys[1])) == len(keys[1]) == 3 * len(keys[0])
    folder = run.run(plain, Options(here / "out"), Console(quiet=True))
    assert list(rows_of(folder)) == COLUMNS
    assert all(
        set(model) == {"name", "sha256"} for model in json.loads((folder / "provenance.json").read_text())["models"]
    )


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("int4", "weights: there is no weight format 'int4'; allowed: as-is, int8, int4-g128"),
        ("int4-g128", "does not divide the 32 of 0.q; allowed for this model: int4-g16, int4-g8"),
        ("int8,int8", "weights: int8 stands there twice"),
        ("int8,", "--weights 'int8,': a name is missing"),
    ],
)
def test_bad_formats_are_refused_before_anything_is_measured(here, monkeypatch, capsys, weights, said):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "a/model", "--weights", weights) != 0
    printed = capsys.readouterr()
    assert said in " ".join((printed.out + printed.err).split())
    assert not (Path("results")).exists()


def test_a_quantised_checkpoint_is_refused(here):
    config = here / "a/model/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    source = models.ModelSource("model", here / "a/model", "0" * 64)
    with pytest.raises(ModelError, match=r"--weights int8-g8: .* is a quantised checkpoint \(FP8\); allowed: plain"):
        in_formats([source], ["as-is", "int8-g8"])


def test_names_of_formats_come_and_go():
    for name in ("model", "SmolLM2 (Q4_1, dequantised)"):
        assert without_format(with_format(name, "int4-g32"), "int4-g32") == name
        assert without_format(name, "as-is") == name
        assert short(with_format(name, "int4-g32-gptq")) == f"{short(name)} (int4-g32-gptq)"
        assert short(with_weights(with_format(name, "int8"), "0" * 12)) == f"{short(name)}@{'0' * 12} (int8)"


def test_published_figures_are_of_weights_as_they_are():
    for name in ("Llama-2-7b-hf", "Llama-2-7b-hf (Q8_0, dequantised)"):
        assert is_counterpart(name, "meta-llama/Llama-2-7b-hf")
        assert not is_counterpart(with_format(name, "int4-g128"), "meta-llama/Llama-2-7b-hf")


def point(form, method, bits, loss):
    return Point(form, method, 0.5, bits, loss, loss - 0.01, loss + 0.01)


def test_the_front_has_what_nothing_is_better_than():
    points = [point("a", "dense", 16, 0.0), point("b", "dense", 8, 0.1), point("a", "teal", 8, 0.2)]
    points += [point("b", "teal", 4, 0.3), point("c", "dense", 4.1, 0.4), point("c", "teal", 2, 5.0)]
    assert [(p.format, p.method) for p in front(points)] == [
        ("c", "teal"),
        ("b", "teal"),
        ("b", "dense"),
        ("a", "dense"),
    ]
    drawn = chart(points, "tiny")
    assert [panel.title for panel in drawn.panels] == ["best of all methods", "teal"]
    assert [s.method for s in drawn.panels[1].series] == ["a", "b", "c"]
    assert drawn.panels[1].series[0].x == [8, 16]
    assert drawn.panels[0].front == [(4, 0.3), (8, 0.1), (16, 0.0)]
    assert "1 of 6 points lose more" in drawn.note


def test_answers_of_a_dense_model_are_kept_by_the_text_that_its_codes_were_found_on(suite, here):
    asked = suite.model_copy(update={"tasks": TasksConfig(names=["piqa"])})
    other = asked.model_copy(update={"calibration": asked.calibration.model_copy(update={"statistics_windows": 2})})
    same = {"int4-g16": True, "int4-g16-gptq": False}
    for source in in_formats([models.resolve("a/model")], list(same)):
        settings = [
            LoadedModel(of, source, "cpu", lambda *args: None)._tasks(None, "float32").setting for of in (asked, other)
        ]
        assert (settings[0] == settings[1]) is same[source.weights]


@pytest.mark.parametrize(("count", "mark"), [(2, ""), (40, ""), (41, " ≈")])
def test_what_is_within_noise_is_marked_where_noise_is_known(count, mark):
    """Two windows have no interval: nothing is within it."""
    apart = np.full(count, 0.5) if count != 41 else np.linspace(-1.0, 1.0, count)
    lost = {("a", "dense", 0.5): [np.zeros((1, count))], ("b", "dense", 0.5): [apart[None]]}
    best, other = point("a", "dense", 8, 0.0), point("b", "dense", 8, float(apart.mean()))
    assert weights._best_of([other], best, lost) == f"{apart.mean():.3f} b{mark}"


def test_a_cell_that_fails_now_agrees_with_nothing(here, monkeypatch, capsys):
    run = ["mine.toml", "--model", "a/model"]
    assert tiny.resting(monkeypatch, "run", *run) == 0

    def fails(*args, **kwargs):
        raise RuntimeError("the kernel is gone")

    monkeypatch.setattr(perplexity, "score", fails)
    with pytest.raises(BenchmarkError, match=r"dense at 0 failed: .*the kernel is gone|teal at 0\.5 failed: .*is gone"):
        verify.verify(here / "results/mine-model", Options(here, "a/model"), 2, 0, 0.1, Console(quiet=True))


def test_bits_count_the_output_layer_where_a_format_stores_it():
    """Of 100 weights in blocks and 25 in the output layer, which has 16 bits in the other formats."""
    points = [point("as-is", "dense", 16.0, 0.0), point("int4-g32", "teal", 2.0, 0.3)]
    facts = {"cells": [{"model": "other"}, {"model": "m", "reads": {"elements": 100, "output": 25}}]}
    assert weights._with_head(points, "m", facts) == points
    points.append(point("int4-g32-head", "teal", 2.0, 0.4))
    found = weights._with_head(points, "m", facts)
    assert [p.cost for p in found] == [16.0, (2 * 100 + 16 * 25) / 125, (2 * 100 + 4.5 * 25) / 125]
    assert [p.loss for p in found] == [0.0, 0.3, 0.4]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("lsq(teal)", {}), ("lsq-stream(teal)", {}), ("spon(teal)", {"gains": True}), ("spon-refined(teal)", {"rank": 2})],
)
def test_methods_that_replace_weights_are_refused_before_they_are_fitted(name, parameters, monkeypatch):
    method = registry.build(name, 0.3, parameters)
    plans.check_method("as-is", method)
    with pytest.raises(PlanError, match=r"replaces weights, which are stored as int8-g16; allowed on quantised"):
        plans.check_method("int8-g16", method)
    for other in ("spon(teal)", "mean-error(teal)", "rsparse"):
        plans.check_method("int8-g16", registry.build(other, 0.3, {}))
    with pytest.raises(PlanError, match="larosa rewrites the model"):
        plans.check_method("int8-g16", registry.build("mean-error(larosa)", 0.3, {}))
    loaded = SimpleNamespace(fit_setting={}, source=SimpleNamespace(weights="int8-g16"), calibrated=pytest.fail)
    monkeypatch.setattr(plans, "cell_key", lambda *_: "0" * 32)
    with pytest.raises(PlanError, match="replaces weights"):
        plans.fitted(loaded, SimpleNamespace(sparsifier=method))
