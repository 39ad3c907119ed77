"""What is measured on a GPU is kept on disk, and a fingerprint outlives weights that only move."""

from __future__ import annotations

import json

import pytest
import torch
from decoders import decoder_of, masks
from families import build

from resting.sparsifier import PlanError, fingerprint
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding import remembered as module
from resting.sparsifier.decoding.remembered import FILE, remembered

GPU = torch.device("cuda")


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "_where", lambda device: "a GPU, driver 1")
    return tmp_path / "cache" / FILE


def test_it_is_measured_once(cache, monkeypatch):
    asked = []
    measure = lambda: asked.append(1) or [64, 128, 2, len(asked)]  # noqa: E731
    assert remembered("layout", "4x4", GPU, measure) == [64, 128, 2, 1]
    assert remembered("layout", "4x4", GPU, measure) == [64, 128, 2, 1]
    assert remembered("layout", "4x8", GPU, measure)[3] == 2
    assert remembered("break-even", "4x4", GPU, lambda: 0.25) == 0.25
    monkeypatch.setattr(module, "_where", lambda device: "a GPU, driver 2")
    assert remembered("layout", "4x4", GPU, measure)[3] == 3
    kept = json.loads(cache.read_text())
    assert kept["a GPU, driver 1"] == {
        "layout 4x4": [64, 128, 2, 1],
        "layout 4x8": [64, 128, 2, 2],
        "break-even 4x4": 0.25,
    }


@pytest.mark.parametrize("damaged", ["", "{", "[1]", '{"a GPU, driver 1": 3}', "\x00"])
def test_a_damaged_file_is_measured_again(cache, damaged):
    cache.parent.mkdir()
    cache.write_text(damaged)
    assert remembered("layout", "4x4", GPU, lambda: 7) == 7
    assert remembered("layout", "4x4", GPU, lambda: 8) == 7


def test_a_cache_that_cannot_be_written_to_costs_a_measurement(cache):
    cache.parent.write_text("a file where the folder belongs")
    assert remembered("layout", "4x4", GPU, lambda: 7) == 7
    assert remembered("layout", "4x4", GPU, lambda: 8) == 8


def test_nothing_is_kept_of_a_cpu(cache):
    assert remembered("break-even", "4x4", torch.device("cpu"), lambda: 1.0) == 1.0
    assert not cache.exists()


def moved(model, inside):
    """What the weights go through in a block that keeps them in another order."""
    moving = fingerprint.Moving(model)
    weight = model.lm_head.weight
    weight.data = weight.data.t().contiguous().t()
    moving.moved()
    inside()
    moving.leaving()
    weight.data = weight.data.contiguous()
    moving.back()


def test_weights_that_move_have_the_same_fingerprint(monkeypatch):
    model = build("llama")
    before = fingerprint.of_model(model)
    moved(model, lambda: None)
    monkeypatch.setattr("hashlib.sha256", None)  # it is not computed again
    assert fingerprint.of_model(model) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.weight.add_(1.0),
        lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(model.lm_head.weight + 1.0)),
        lambda model: setattr(model.model.norm.weight, "data", 2.0 * model.model.norm.weight.data),
        lambda model: model.half().float(),
    ],
    ids=["written", "replaced", "data", "rounded"],
)
@torch.no_grad()
def test_weights_that_are_written_to_have_another(change):
    model = build("llama")
    before = fingerprint.of_model(model)
    moved(model, lambda: change(model))
    found = fingerprint.of_model(model)
    other = build("llama")
    other.load_state_dict(model.state_dict())
    assert found == fingerprint.of_model(other)
    assert (found != before) == any(
        not torch.equal(a, b) for a, b in zip(model.parameters(), build("llama").parameters())
    )


@torch.no_grad()
def test_a_plan_is_refused_by_a_model_that_was_changed_while_it_decoded():
    model = decoder_of("llama")
    plan = masks(model)
    with decoding(plan, model):
        model.model.norm.weight.data = 2.0 * model.model.norm.weight.data
    with pytest.raises(PlanError, match="this plan was fitted on model"):
        plan.check(model)
