"""Shows a person what a running suite does."""

from __future__ import annotations

import time
from typing import Any

import rich.console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

PERIOD = 30.0
"""Seconds between two lines about the progress, where there is no terminal to draw bars on."""


class Console:
    """Shows the progress of a run and of its present cell; finished rows stay on the screen.

    Without a terminal a line says now and then how many cells are through, and how long the rest will take; where
    there is no sweep, how far the present step is.

    Parameters
    ----------
    quiet : bool
        Print nothing (tests).
    """

    def __init__(self, quiet: bool = False) -> None:
        self._console = rich.console.Console(quiet=quiet, stderr=True, emoji=False)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            transient=True,
        )
        self._sweep: TaskID | None = None
        self._stage: TaskID | None = None
        self._present = ""
        self._began = self._said = time.monotonic()
        self._index, self._total, self._measured = 0, 0, 0

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, index: int, total: int, name: str) -> None:
        """Show that cell `index` of `total` starts."""
        if self._sweep is None:
            self._progress.start()
            self._sweep = self._progress.add_task("cells", total=total, note="")
            self._began = self._said = time.monotonic()
        self._index, self._total = index, total
        self._say_now_and_then(name)
        self._progress.update(self._sweep, completed=index, note=name)

    def stage(self, name: str, done: int, total: int, note: str = "") -> None:
        """Show a step inside the present cell, or of a download."""
        self._progress.start()
        self._show(name, done, total, note)
        self._say_now_and_then(f"{name} {done} of {total}")

    def finished(self, rows: list[dict[str, Any]], cached: bool = False) -> None:
        """Show the rows of a cell."""
        self._clear()
        self._measured += not cached
        for row in rows:
            name = f"{row['method']:<28} {row['target']:<5.4g}"
            if row["value"] is None:
                self.say(f"{name}  {row['metric']:<32} -        {row['reason']}")
            else:
                error = "" if row["stderr"] is None else f"± {row['stderr']:.3g}"
                measured = f"measured {row['byte_sparsity']:.3f}"
                self.say(
                    f"{name}  {row['metric']:<32} {row['value']:<9.4g} {error:<9} {measured}{' (cached)' * cached}"
                    f"{'  ' + row['reason'] if row['reason'] else ''}"
                )

    def end(self) -> None:
        """Take the bars off the screen."""
        self._clear()
        self._progress.stop()

    def _say_now_and_then(self, what: str) -> None:
        """Say in a line how far the run is, if there is no terminal and it was not said lately."""
        now = time.monotonic()
        if self._console.is_terminal or now - self._said < PERIOD:
            return
        self._said = now
        spent = now - self._began
        if not self._total:  # no sweep: a study, a fit or a download
            self.say(f"{what}, {duration(spent)} since the beginning")
            return
        left = spent / self._measured * (self._total - self._index) if self._measured else None
        rest = "time left unknown" if left is None else f"about {duration(left)} left"
        self.say(f"cells: {self._index} of {self._total}, {duration(spent)} so far, {rest} ({what})")

    def _show(self, name: str, done: int, total: int, note: str) -> None:
        if self._stage is None or self._present != name:
            self._clear()
            self._stage = self._progress.add_task(name, total=total, note=note)
            self._present = name
        self._progress.update(self._stage, completed=done, total=total, note=note)

    def _clear(self) -> None:
        if self._stage is not None:
            self._progress.remove_task(self._stage)
            self._stage = None


def duration(seconds: float) -> str:
    """Write a time in the unit that a person would take: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
