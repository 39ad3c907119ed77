"""What is measured on a GPU is kept on disk, and a fingerprint outlives weights that only move."""

from __future__ import annotations

import json

import pytest
import torch
from families import build

from resting.sparsifier import fingerprint
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


def test_weights_that_move_have_the_same_fingerprint(monkeypatch):
    model = build("llama")
    before = fingerprint.of_model(model)
    weight = model.lm_head.weight
    with fingerprint.kept(model):
        weight.data = weight.data.t().contiguous().t()
    monkeypatch.setattr("hashlib.sha256", None)  # it is not computed again
    assert fingerprint.of_model(model) == before


def test_weights_that_are_written_to_have_another():
    model = build("llama")
    before = fingerprint.of_model(model)
    with fingerprint.kept(model), torch.no_grad():
        model.lm_head.weight.add_(1.0)
    assert fingerprint.of_model(model) != before
    model = build("llama")
    assert fingerprint.of_model(model) == before
    with fingerprint.kept(model):
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 1.0)
    assert fingerprint.of_model(model) != before
