"""The scripts in examples/ run, on a tiny model."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import tiny
import torch

from resting import Teal

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


def test_my_text_my_table(llama, tmp_path):
    example = _load("my_text_my_table")
    (tmp_path / "mine.txt").write_text(" ".join(f"word{i % 89} and{i % 7}" for i in range(900)))
    few = {"window": 16, "statistics_windows": 4, "matching_windows": 2, "held_out_windows": 3}
    example.METHODS["spon(teal)"] |= {"steps": 1, "parameters": {"window": 16, "batch": 2}}
    plans = example.compare(llama, tiny.tokenizer(), str(tmp_path / "mine.txt"), **few)
    lines = example.table(plans).splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["teal", "wina", "spon(teal)"]
    for line, plan in zip(lines[2:], plans, strict=True):
        assert float(line.split("|")[2]) == pytest.approx(plan.info["measured"]["byte_sparsity"], abs=5e-4)
        assert plan.info["measured"]["byte_sparsity"] == pytest.approx(0.5, abs=0.1)
    assert example.look(plans[0]).count("\n") == 5


def test_generate_and_time(llama, calibration):
    plan = Teal(target=0.5).fit(llama, calibration)
    ids = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(7))
    written, dense, sparse = _load("generate_and_time").in_turn(llama, plan, ids, new=6, rounds=1)
    assert written.shape == (1, 12)
    assert math.isfinite(dense)  # one time less another: of so small a model it can be below 0
    assert math.isfinite(sparse)
    with plan.applied(llama), torch.inference_mode():
        assert torch.equal(written, llama.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None))


def test_add_a_method(llama, calibration, held_out, capsys):
    lost = _load("add_a_method").compare(llama, calibration, held_out)
    assert {method for method, _ in lost} == {"teal", "tilted"}
    assert lost["tilted", 0.5] != lost["teal", 0.5]
    assert "0.50 (" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) <= 60
