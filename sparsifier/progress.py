"""Defines how work that takes long tells its caller how far it is."""

from __future__ import annotations

from collections.abc import Callable

OnProgress = Callable[[str, int, int, str], None]
"""Called with a stage, the steps done, the steps in all, and a note."""


def silent(stage: str, done: int, total: int, note: str) -> None:
    """Ignores progress: the `OnProgress` of callers who ask for none."""
