"""Comparing what was measured with the committed references."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resting.benchmarks.errors import BenchmarkError

# Tolerances, absolute. Each is a few times the spread that `resting guard` shows on one machine when torch and its
# libraries are told to use other instruction sets (ATEN_CPU_CAPABILITY=default or avx2, MKL_ENABLE_INSTRUCTIONS=SSE4_2
# or AVX2, ONEDNN_MAX_CPU_ISA=AVX2), which is how processors differ: 1e-5 nats, from logits in float32, and less than
# 1e-6 of the others. In float32 it would be far more: see quality.py. What a wrong threshold (5 % off), a swapped mask
# or a doubled bias does is more than a hundred times larger: tests/test_guard.py.
TOLERANCES = {
    "nats dense": 5e-5,
    "nats above dense": 5e-5,
    "byte sparsity": 1e-5,
    "nominal": 1e-5,
    "bytes": 0.0,
    "masks": 0.0,
}
LEAST = {"kernel 0.9 over 0": 3.0, "kernel 0.9 over linear": 2.0}
"""Ratios inside one process: a kernel that reads what rests has 1. They are 6 and more where they were measured."""


@dataclass(frozen=True)
class Finding:
    """One figure against its reference.

    Attributes
    ----------
    name : str
    found, reference : float or str
    allowed : str
    holds : bool
    """

    name: str
    found: Any
    reference: Any
    allowed: str
    holds: bool

    def __str__(self) -> str:
        mark = "ok  " if self.holds else "FAIL"
        return f"{mark} {self.name:<36} {_short(self.found):<22} {_short(self.reference):<22} {self.allowed}"


def findings(found: dict[str, Any], reference: dict[str, Any]) -> list[Finding]:
    """Every figure that was found or is referred to, in order; one that only one side has does not hold."""
    out = []
    for name in dict.fromkeys([*reference, *found]):
        mine, theirs = found.get(name), reference.get(name)
        if name in LEAST:
            out.append(Finding(name, mine, "-", f"at least {LEAST[name]:g}", mine is not None and mine >= LEAST[name]))
            continue
        tolerance = next(value for prefix, value in TOLERANCES.items() if name.startswith(prefix))
        if mine is None or theirs is None:
            out.append(Finding(name, mine, theirs, "both", False))
        elif isinstance(theirs, str) or tolerance == 0.0:
            out.append(Finding(name, mine, theirs, "the same", mine == theirs))
        else:
            out.append(Finding(name, mine, theirs, f"± {tolerance:g}", abs(mine - theirs) <= tolerance))
    return out


def load(path: Path) -> dict[str, Any]:
    """The references of a file.

    Raises
    ------
    BenchmarkError
        If it cannot be read.
    """
    try:
        return dict(json.loads(path.read_text())["values"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path} holds no references ({error}); `resting guard --update` writes them") from None


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:20]
