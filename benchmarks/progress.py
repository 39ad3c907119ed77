"""Shows a person what a running suite does."""

from __future__ import annotations

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


class Console:
    """Shows the progress of a run and of its present cell; finished rows stay on the screen.

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

    def say(self, text: str) -> None:
        """Print a line."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def begin(self, index: int, total: int, name: str) -> None:
        """Show that cell `index` of `total` starts."""
        if self._sweep is None:
            self._progress.start()
            self._sweep = self._progress.add_task("cells", total=total, note="")
        self._progress.update(self._sweep, completed=index, note=name)

    def stage(self, name: str, done: int, total: int, note: str = "") -> None:
        """Show a step inside the present cell, or of a download."""
        self._progress.start()
        self._show(name, done, total, note)

    def finished(self, rows: list[dict[str, Any]], cached: bool = False) -> None:
        """Show the rows of a cell."""
        self._clear()
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
