"""The scripts in examples/ run, on a tiny model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def held_out() -> torch.Tensor:
    return torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(7))


def test_fit_and_look(llama, calibration, held_out, capsys):
    lost = _load("fit_and_look").compare(llama, calibration, held_out, steps=2)
    assert set(lost) == {"teal", "spon(teal)"}
    said = capsys.readouterr().out
    assert said.count("of the bytes unread") == 2
    assert "bias of length" in said


def test_add_a_method(llama, calibration, held_out, capsys):
    lost = _load("add_a_method").compare(llama, calibration, held_out)
    assert {method for method, _ in lost} == {"teal", "tilted"}
    assert lost["tilted", 0.5] != lost["teal", 0.5]
    assert "0.50 (" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 60
