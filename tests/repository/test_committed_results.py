"""No test reads what a command of the README writes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted(path for path in (ROOT / "tests").rglob("*.py") if path != Path(__file__))
REPOSITORY = re.compile(r"""(?:ROOT|parents\[\d\]|cwd\(\))\s*/\s*f?["']results\b["'/]?(?P<rest>[^\n]*)""")
BY_HAND = (
    ' / "guard" / "reference.json"',
    ' / part / "README.md" for part in ("", "method")',
    ' / "README.md").read_text()',
)
"""What stands in results/ and no command of the README writes: the guard's references, and two texts."""


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_committed_results_are_read_by_no_test(path):
    for found in REPOSITORY.finditer(path.read_text()):
        assert found["rest"].startswith(BY_HAND), f"{path.name}: {found[0]}; tests read tests/data/results"


@pytest.mark.parametrize(
    "line",
    [
        'RESULTS = Path(__file__).parents[2] / "results"',
        'ROOT / "results" / "baselines"',
        'ROOT / "results/baselines/results.csv"',
        'Path.cwd() / "results"',
    ],
)
def test_such_a_line_would_be_found(line):
    found = REPOSITORY.search(line)
    assert found
    assert not found["rest"].startswith(BY_HAND)
