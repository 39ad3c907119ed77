"""How much goes through a GPU at once follows from the model and the GPU's size, and leaves a CPU as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from resting.sparsifier import batches

GIB = 2**30


def model(device, hidden, intermediate, bytes_each=2):
    weight = SimpleNamespace(device=torch.device(device), element_size=lambda: bytes_each)
    config = SimpleNamespace(hidden_size=hidden, intermediate_size=intermediate)
    config.get_text_config = lambda: config
    return SimpleNamespace(parameters=lambda: iter([weight]), config=config)


@pytest.mark.parametrize(
    ("memory", "hidden", "intermediate", "asked", "window", "found"),
    [
        (80, 576, 1536, 16, 512, 64),  # 32,768 tokens
        (80, 4096, 14336, 16, 512, 64),
        (24, 4096, 14336, 4, 512, 27),  # an eighth of 24 GiB, at 8 x 14,336 x 2 bytes a token
        (24, 4096, 14336, 1, 4096, 3),
        (8, 4096, 14336, 16, 512, 16),  # never fewer than the suite asks for
        (80, 576, None, 16, 512, 64),
    ],
)
def test_batches_follow_the_size_of_the_gpu(memory, hidden, intermediate, asked, window, found, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory * GIB))
    assert batches.windows_per_forward(asked, window, model("cuda", hidden, intermediate)) == found
    assert batches.windows_per_forward(asked, window, model("cpu", hidden, intermediate)) == asked


@pytest.mark.parametrize(
    ("free", "reserved", "allocated", "has"), [(50, 10, 5, True), (44, 0, 0, False), (30, 30, 5, True)]
)
def test_half_of_a_gpu_stays_free(free, reserved, allocated, has, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: reserved * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated * GIB)
    assert batches.has_room(torch.device("cuda"), 5 * GIB) is has
