"""What is timed: models with their own weights, and random ones in published shapes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny import TINY_LATENCY, model_folder, provide_texts

from resting.benchmarks.cells import registry
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.cli import dry_run
from resting.benchmarks.errors import AssetError, SuiteError
from resting.benchmarks.latency.random_models import random_model, shapes, shapes_by_hub_id
from resting.benchmarks.latency.setting import Setting
from resting.benchmarks.latency.timed_model import RandomModel, RealModel, load
from resting.benchmarks.progress import Console
from resting.sparsifier.fingerprint import of_model

SMALL = {"num_hidden_layers": 1, "vocab_size": 64, "intermediate_size": 64}


def setting(tmp_path: Path, **changes: object) -> Setting:
    return Setting.of(Suite.model_validate(TINY_LATENCY | changes), Options(tmp_path), Console(quiet=True))


def test_random_weights_are_seeded():
    first, second = (random_model("tiny", torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("name", list(shapes()))
def test_a_random_model_has_the_published_configuration(name):
    model = random_model(name, torch.bfloat16, "meta")
    config = json.loads(model.config.to_json_string(use_diff=False))
    for key, value in shapes()[name].items():
        found = config["rope_parameters"][key] if key == "rope_theta" else config[key]
        assert found == value, key
    heads = config["num_attention_heads"]
    size = shapes()[name].get("head_dim", config["hidden_size"] // heads)
    assert model.model.layers[0].self_attn.q_proj.out_features == heads * size


def test_changes_are_put_in_place_of_a_shape_s_own_values():
    model = random_model("llama-3-8b", torch.float32, "meta", **SMALL)
    assert len(model.model.layers) == 1
    assert model.get_input_embeddings().weight.shape == (64, 4096)
    assert shapes()["llama-3-8b"]["num_hidden_layers"] == 32


def test_an_unknown_shape_is_refused():
    with pytest.raises(SuiteError, match=r"unknown shape 'nosuch'; allowed: llama-3\.2-1b, "):
        random_model("nosuch", torch.float32)


def test_a_dry_run_knows_published_shapes_by_their_hub_ids():
    assert "tiny" not in {*shapes_by_hub_id()}
    assert {str(config) for config in shapes_by_hub_id().values()} == {
        str(c) for n, c in shapes().items() if n != "tiny"
    }
    assert shapes_by_hub_id()["meta-llama/Llama-3.1-8B-Instruct"] == shapes()["llama-3-8b"]
    suite = Suite.model_validate(TINY_LATENCY)
    for name, hub in (("llama-2-13b", "meta-llama/Llama-2-13b-hf"), ("qwen3-8b", "Qwen/Qwen3-8B")):
        assert dry_run.shape(hub, suite) == (shapes()[name], False)
    with pytest.raises(AssetError):
        dry_run.shape("tiny", suite)


def test_random_weights_are_known_by_their_shape(tmp_path):
    timed = load("tiny", "float32", setting(tmp_path))
    assert isinstance(timed, RandomModel)
    assert timed.name == "tiny shape (random weights)"
    assert timed.dense is not timed.sparse
    timed.declare()
    known = of_model(timed.dense)
    third = timed.third_copy
    assert third is timed.third_copy is timed.copies[-1]
    third.get_input_embeddings().weight.data = third.get_input_embeddings().weight.data.clone()
    timed.declare()
    assert {of_model(model) for model in (timed.dense, timed.sparse, third)} == {known}


def test_biases_are_drawn_for_methods_that_have_some_and_can_be_left_out(tmp_path):
    found = setting(tmp_path)
    timed = load("tiny", "float32", found)
    for cell in found.sparse_cells:
        plan = timed.plan(cell)
        without = timed.without_biases(cell, plan)
        biased = {site.role for site, rule in plan.rules.items() if rule.bias is not None}
        if cell.label == "teal":
            assert not biased
            assert without is None
        else:
            assert biased == {"down"}
            assert without is not None
            assert [rule.threshold for rule in without.rules.values()] == [r.threshold for r in plan.rules.values()]
            assert all(rule.bias is None for rule in without.rules.values())


def test_a_model_in_a_folder_has_the_plans_that_quality_is_measured_with(tmp_path, monkeypatch):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    provide_texts(monkeypatch)
    calibration = {"window": 16, "statistics_windows": 4, "matching_window": 16, "matching_windows": 2}
    spec = str(model_folder(tmp_path / "model"))
    found = setting(tmp_path, calibration=calibration)
    timed = load(spec, "float32", found)
    assert isinstance(timed, RealModel)
    assert timed.ids.shape == (1, 17)
    before = of_model(timed.dense)
    timed.declare()
    assert of_model(timed.dense) == before
    plan = timed.plan(found.sparse_cells[0])
    assert plan.model == before
    assert plan.rules
    assert any((tmp_path / "cache" / "plans").iterdir())


def test_cells_are_expanded_once(tmp_path, monkeypatch):
    built = []
    build = registry.build
    monkeypatch.setattr(
        registry, "build", lambda name, target, *more: built.append(target) or build(name, target, *more)
    )
    found = setting(tmp_path)
    assert [cell.label for cell in found.cells] == ["dense", "teal", "teal", "mean-error(teal)"]
    expanded = [*built]
    timed = load("tiny", "float32", found)
    assert [timed.plan(cell).method for cell in found.sparse_cells] == ["teal", "mean-error(teal)", "teal"]
    assert built == expanded
