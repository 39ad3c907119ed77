"""Fingerprints: the chain that plans have named since the first version, and the hash of pieces of large models."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
import torch
from families import build

from resting.baselines.teal import Teal
from resting.sparsifier import PlanError, fingerprint


def chain(model):
    """One sha256 over names, shapes and bfloat16 values."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name}{list(parameter.shape)}".encode())
        digest.update(parameter.detach().to(torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def large(monkeypatch):
    """Makes every model a large one, of many pieces."""
    monkeypatch.setattr(fingerprint, "LARGE", 1)
    monkeypatch.setattr(fingerprint, "PIECE", 100)


def test_a_model_s_fingerprint_is_the_chain(model):
    assert fingerprint.of_model(model) == chain(model)


def test_pieces_are_told_apart_by_values_names_and_places(llama, large):
    first = fingerprint.of_model(llama)
    assert first != chain(llama)
    assert fingerprint.of_model(build("llama").to(torch.bfloat16)) == first
    with torch.no_grad():
        weight = llama.model.layers[1].mlp.up_proj.weight
        weight[[0, 20]] = weight[[20, 0]].clone()
    assert fingerprint.of_model(llama) != first
    with torch.no_grad():
        weight[[0, 20]] = weight[[20, 0]].clone()
    assert fingerprint.of_model(llama) == first
    weight.requires_grad_(False).transpose_(0, 1)  # the same bytes in another shape
    assert fingerprint.of_model(llama) != first


@pytest.mark.parametrize("size", [1, 7, 4000])
def test_pieces_hold_every_entry_once(size, monkeypatch):
    monkeypatch.setattr(fingerprint, "PIECE", size)
    tensor = torch.arange(60.0).view(12, 5)
    assert torch.equal(torch.cat(list(fingerprint._pieces(tensor))), tensor)


def test_a_plan_of_an_earlier_version_fits_a_large_model(llama, calibration, large):
    plan = Teal(0.5).fit(llama, calibration)
    assert plan.model != chain(llama)
    with replace(plan, model=chain(llama)).applied(llama):
        pass
    with pytest.raises(PlanError, match="fitted on model 0000000000000000, not on"):
        replace(plan, model="0" * 64).check(llama)


@pytest.mark.parametrize("tensor", [torch.tensor(1.5), torch.zeros(0), torch.ones(3, 4).T, torch.tensor([True, False])])
def test_a_tensor_s_hash_is_that_of_its_bytes(tensor):
    assert fingerprint.of_tensor(tensor) == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_on_a_gpu_has_the_fingerprint_it_has_in_memory(dtype, large, monkeypatch):
    monkeypatch.setattr(fingerprint, "PIECE", 4096)
    monkeypatch.setattr(fingerprint, "CHUNK", 1000)
    model = build("llama").to(dtype)
    expected = fingerprint._of_pieces(model)
    assert fingerprint._of_pieces(model.cuda()) == expected


@pytest.mark.parametrize("size", [1, 7, 10**6])
def test_chunks_change_no_hash(size, large, llama, monkeypatch):
    expected = fingerprint._of_pieces(llama)
    monkeypatch.setattr(fingerprint, "CHUNK", size)
    assert fingerprint._of_pieces(llama) == expected
