"""Prints tables and reports: laid out on a terminal, as Markdown in a pipe or a file."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

CUT, CUT_TO = ("what", "methods", "targets"), 16
"""Columns that a narrow terminal cuts, so that each row is a line, and the width that they keep."""
IMAGE = re.compile(r"^!\[.*\]\(.*\)$", re.MULTILINE)
GAP = 3
"""Between two columns."""


@dataclass(frozen=True)
class Listing:
    """Holds one table of what there is.

    Attributes
    ----------
    title : str
    columns : sequence of str
    rows : sequence of sequence of str
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def objects(self) -> list[dict[str, str]]:
        """Return the rows with the names of their columns, for ``--json``."""
        return [dict(zip(self.columns, row)) for row in self.rows]


def listings(tables: Sequence[Listing]) -> None:
    """Print tables, each below its title."""
    out = _terminal()
    for table in tables:
        if out is None:
            print(f"## {table.title}\n\n{markdown(table.columns, table.rows)}\n")
            continue
        shown = Table(*table.columns, title=table.title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        widths = _widths(table, out.width)
        for row in table.rows:
            shown.add_row(*(_cut(cell, width) for cell, width in zip(row, widths)))
        # A terminal that is too narrow even for the names breaks lines by itself.
        out.print(shown, width=max(out.width, sum(widths) + GAP * len(widths)))


def _widths(table: Listing, width: int) -> list[int]:
    """Widths of columns: whole names, and sentences and lists cut so that each row is a line of `width`."""
    whole = [max([len(head), *(len(row[i]) for row in table.rows)]) for i, head in enumerate(table.columns)]
    free = width - GAP * len(whole) - sum(size for size, head in zip(whole, table.columns) if head not in CUT)
    narrow = sorted(size for size, head in zip(whole, table.columns) if head in CUT)
    share = free
    for left, size in zip(range(len(narrow), 0, -1), narrow):  # what a short column leaves, the longer ones get
        share = free // left
        free -= min(size, share)
    return [min(size, max(share, CUT_TO)) if head in CUT else size for size, head in zip(whole, table.columns)]


def _cut(cell: str, width: int) -> str:
    return cell if len(cell) <= width else f"{cell[: width - 1]}…"


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table in Markdown, one line a row."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def as_json(content: Any) -> None:
    """Print `content` as JSON and nothing else."""
    print(json.dumps(content, indent=1, ensure_ascii=False))


def folder(path: Path) -> None:
    """Print the report in a results folder, and which files lie there."""
    text = (path / "README.md").read_text(encoding="utf-8")
    out = _terminal()
    if out is None:
        print(text)
    else:
        out.print(Markdown(IMAGE.sub("", text)))
    for file in sorted(path.iterdir()):
        print(f"wrote {file}")


def _terminal() -> Console | None:
    """The terminal that this command writes to; None where it writes to a pipe or a file."""
    found = Console(markup=False, emoji=False, highlight=False)
    return found if found.is_terminal else None
