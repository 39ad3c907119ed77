"""Tells other programs what a run does: a file of JSON lines, or functions of theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resting.benchmarks.errors import BenchmarkError

OnEvent = Callable[[Mapping[str, Any]], Any]
"""Is called with every event (`Events.tell`); what it gives back is not used."""


class Events:
    """Hands the events of a run to a listener.

    A listener that raises does not end the run: it is reported once, and not called again.

    Parameters
    ----------
    listener : callable, optional
    warn : callable
        Is told, in a sentence, that the listener failed.
    """

    def __init__(self, listener: OnEvent | None, warn: Callable[[str], Any]) -> None:
        self._listener, self._warn = listener, warn

    def tell(self, event: str, **facts: Any) -> None:
        """Hand on that `event` happened.

        Parameters
        ----------
        event : str
            ``run-started``, ``cell-started``, ``cell-finished``, ``job-finished``, ``model-refused``, ``run-finished``,
            ``run-stopped``.
        **facts
            JSON values; numbers that are not finite become None.
        """
        if self._listener is None:
            return
        told = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event}
        told |= {name: _finite(value) for name, value in facts.items()}
        try:
            self._listener(told)
        except Exception as error:
            self._listener = None
            self._warn(f"what listens to the run failed ({type(error).__name__}: {error}) and is told no more")


class JsonLines:
    """Writes every event as one line of JSON, at once, behind what is in the file.

    Parameters
    ----------
    path : Path

    Raises
    ------
    BenchmarkError
        If the file cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("a", encoding="utf-8"):
                pass
        except OSError as error:
            raise BenchmarkError(f"--log: {path} cannot be written to: {error.strerror}") from error

    def __call__(self, event: Mapping[str, Any]) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False, allow_nan=False, default=str) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(of) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(of) for of in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
