"""Compares what was measured with the committed references."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resting.benchmarks.errors import BenchmarkError

# Tolerances, absolute: about eight times what jitter.py measures, since chaos has a long tail.
#
# - Thresholds and biases that are off by float32's rounding (1e-7 of themselves) move KL by 2.5e-3 nats, byte sparsity
#   by 1.3e-4, a layer error by 3e-8, and nothing of the tiny model.
# - Other instruction sets, which is how processors differ (ATEN_CPU_CAPABILITY=default or avx2,
#   ONEDNN_MAX_CPU_ISA=AVX2, MKL_ENABLE_INSTRUCTIONS=SSE4_2 or AVX2), move nats of the dense model and KL by 1e-5, from
#   logits in float32, and the others by less than 1e-15.
# - Thresholds that are 5 % off move KL by 0.025, byte sparsity by 0.02 and a layer error by 3e-3; doubled biases move
#   KL by 0.023 and a layer error by 3e-5, swapped masks by 0.033 and 3e-4. The same faults in one block of thirty move
#   the layer error by 9e-5, 5e-7 and 3e-5: tests/checks/test_guard.py.
TOLERANCES = {
    "nats dense": 5e-5,
    "kl": 0.02,
    "byte sparsity": 1e-3,
    "layer error": 2e-7,
    "bytes": 0.0,
    "masks": 0.0,
}
LEAST = {"kernel 0.9 over 0": 3.0, "kernel 0.9 over linear": 2.0}
"""Least ratios of times in one session: a kernel that reads what rests has 1. Measured, they are 6 and more."""


@dataclass(frozen=True)
class Finding:
    """Holds one figure beside its reference.

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
    """Compare every figure that was found or is referred to, in order; one that only one side has does not hold."""
    out = []
    for name in dict.fromkeys([*reference, *found]):
        mine, theirs = found.get(name), reference.get(name)
        if name in LEAST:
            out.append(Finding(name, mine, "-", f"at least {LEAST[name]:g}", mine is not None and mine >= LEAST[name]))
            continue
        if mine is None or theirs is None:
            out.append(Finding(name, mine, theirs, "both", False))
        elif (allowed := tolerance(name)) == 0.0:
            out.append(Finding(name, mine, theirs, "the same", mine == theirs))
        else:
            out.append(Finding(name, mine, theirs, f"± {allowed:g}", abs(mine - theirs) <= allowed))
    return out


def tolerance(name: str) -> float:
    """Say how far a figure may be from its reference; nothing where the two must be the same."""
    return next(value for prefix, value in TOLERANCES.items() if name.startswith(prefix))


def load(path: Path) -> dict[str, Any]:
    """Read the references of a file.

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
