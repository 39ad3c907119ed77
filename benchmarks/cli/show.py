"""Prints tables and reports: laid out on a terminal, as Markdown in a pipe or a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table


@dataclass(frozen=True)
class Listing:
    """Holds one table of what there is.

    Attributes
    ----------
    title : str
    columns : sequence of str
    rows : list of sequence of str
    """

    title: str
    columns: Sequence[str]
    rows: list[Sequence[str]]

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
        shown = Table(*table.columns, title=table.title, title_justify="left")
        for row in table.rows:
            shown.add_row(*row)
        out.print(shown)


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
        out.print(Markdown(text))
    for file in sorted(path.iterdir()):
        print(f"wrote {file}")


def _terminal() -> Console | None:
    """The terminal that this command writes to; None where it writes to a pipe or a file."""
    found = Console(markup=False, emoji=False, highlight=False)
    return found if found.is_terminal else None
