"""The example in docs/add-a-method.md is run as it stands there, and paths that contributors are told exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from conformance import conforms

from resting.benchmarks.cells import registry
from resting.sparsifier import NEURONS, Meter, NeuronMask, Plan, Site, fingerprint
from resting.sparsifier.neurons import SCORES

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "add-a-method.md").read_text()
TEXT = GUIDE + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "docs" / "add-a-model-or-a-task.md").read_text()


def test_the_example_is_a_conforming_method_of_at_most_twenty_lines(tmp_path, monkeypatch, model, ids, calibration):
    code = re.search(r"```python\n(.*?)```", GUIDE, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "tilted_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    cls = registry.load_class("tilted_example:Tilted")
    conforms(cls, {}, model, ids, calibration, tmp_path)
    plan = cls(target=0.5).fit(model, calibration)
    assert plan.method == "tilted"
    assert registry.build("spon(tilted)", 0.5, {}, {"tilted": cls}).label == "spon(tilted)"


def test_the_examples_of_neurons_run(tmp_path, monkeypatch, llama, ids, calibration):
    _, neurons = GUIDE.split("## Masks of neurons")
    lottery, score = re.findall(r"```python\n(.*?)```", neurons, re.DOTALL)[:2]
    (tmp_path / "lottery_example.py").write_text(lottery)
    monkeypatch.syspath_prepend(tmp_path)
    conforms(registry.load_class("lottery_example:Lottery"), {}, llama, ids, calibration, tmp_path)
    try:
        exec(score, {})
        mask = NeuronMask("gate-input", kept=7, tensors={"head": torch.randn(48, 32)})
        plan = Plan({}, "x", 0.3, 0.3, fingerprint.of_model(llama), neurons={Site(0, NEURONS): mask})
        with torch.no_grad(), plan.applied(llama, meter=(meter := Meter())):
            llama(ids)
        rows = 3 * 48 * 32
        total = sum(p.numel() for n, p in llama.named_parameters() if "proj" in n)
        assert meter.byte_sparsity() == pytest.approx((rows * (1 - 7 / 48) - 48 * 32) / total)
    finally:
        SCORES.pop("gate-input", None)


def test_contributing_links_to_the_example():
    assert "docs/add-a-method.md" in (ROOT / "CONTRIBUTING.md").read_text()


PATHS = re.findall(r"`((?:sparsifier|baselines|method|tests|benchmarks|examples|docs)/[\w/.]+)`", TEXT)


@pytest.mark.parametrize("path", sorted(set(PATHS)))
def test_paths_that_it_names_exist(path):
    assert (ROOT / path).exists()
