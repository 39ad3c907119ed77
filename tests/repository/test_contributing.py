"""The example in CONTRIBUTING.md is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conformance import conforms

from resting.benchmarks.cells import registry

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()


def test_the_example_is_a_conforming_method_of_at_most_twenty_lines(tmp_path, monkeypatch, model, ids, calibration):
    code = re.search(r"```python\n(.*?)```", TEXT, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    (tmp_path / "tilted_example.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    cls = registry.load_class("tilted_example:Tilted")
    conforms(cls, {}, model, ids, calibration, tmp_path)
    plan = cls(target=0.5).fit(model, calibration)
    assert plan.method == "tilted"
    assert registry.build("spon(tilted)", 0.5, {}, {"tilted": cls}).label == "spon(tilted)"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`((?:sparsifier|method|tests|benchmarks)/[\w/.]+)`", TEXT))))
def test_paths_that_it_names_exist(path):
    assert (Path(__file__).parents[2] / path).exists()
