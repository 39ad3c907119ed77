"""Every method of the suite `frontier` decodes as docs/frontier.md says, or is refused, and gives what it is."""

from __future__ import annotations

import re
import tomllib
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from decoders import decoder_of
from served import decoded

from resting.benchmarks.cells import registry
from resting.sparsifier import AllButFirst, DecodeOnly, SparsifierError
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.step import by_step

ROOT = Path(__file__).parents[2]
SUITES = ROOT / "benchmarks" / "suites"
SHORT = {"steps": 1, "batch": 2, "window": 16, "match_every": 1, "warmup": 1}
FORMS = {"step": "a step", "layers": "single layers", "refused": "no kernel"}
"""How the table calls what this module finds."""


def methods(suite: str) -> list[str]:
    content = tomllib.loads((SUITES / f"{suite}.toml").read_text())
    return [table["name"] for table in content["methods"] if table["name"] != "dense"]


def table() -> dict[str, tuple[str, str]]:
    """Of every method in the table of forms: its form, and the text beside it."""
    page = (ROOT / "docs" / "frontier.md").read_text().split("## How they decode")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    return {name: (row[1], row[-1]) for row in rows for name in re.findall(r"`([\w()-]+)`", row[0])}


def test_the_table_has_every_method():
    assert sorted(table()) == sorted({*methods("frontier"), *methods("latency-frontier")})
    timed = {name for name, (form, _) in table().items() if form != FORMS["refused"]}
    assert set(methods("latency-frontier")) <= timed
    assert all(text for _, text in table().values())


@pytest.fixture(scope="module")
def model():
    return decoder_of("llama")


@torch.no_grad()
@pytest.mark.parametrize("name", methods("frontier"))
def test_methods_decode_as_the_table_says(model, name, monkeypatch):
    monkeypatch.setattr(by_step, "_said", set())
    parameters = {"spon": SHORT, "teal-greedy": {"step": 0.1, "windows": 2, "window": 16}}
    given = next((values for start, values in parameters.items() if name.startswith(start)), None)
    method = registry.build(name, 0.3, given)
    policy = DecodeOnly(6) if method.needs_prompt else AllButFirst(1)
    calibration = replace(tiny.calibration(), tokens=policy)
    with torch.enable_grad():
        plan = method.fit(model, calibration)
    ids = torch.randint(3, 97, (1, 14), generator=torch.Generator().manual_seed(0))
    with plan.applied(model, policy):
        wanted = decoded(model, ids, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with decoding(plan, model, policy, threads=1):
                form = "layers" if by_step.step_of(model) is None else "step"
                found = decoded(model, ids, 6)
        except SparsifierError:
            form, found = "refused", wanted
    assert FORMS[form] == table()[name][0]
    assert torch.allclose(found, wanted, atol=2e-4 * float(wanted.abs().max()))
