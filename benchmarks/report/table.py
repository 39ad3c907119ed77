"""A table of a report, which is data until a file of it is written, and how its numbers are shown."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from tabulate import tabulate

ESCAPES = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "≈": r"$\approx$",
    "±": r"$\pm$",
    "µ": r"\textmu{}",
}


@dataclass(frozen=True)
class Table:
    """Holds one table, and writes it as Markdown, LaTeX and CSV.

    Attributes
    ----------
    title : str
        Heading of the section that the table stands in. Files are named after it.
    caption : str
        Says what the numbers are; empty where the section has said it.
    headers : list of str
    rows : list of list of str
        Cells may hold Markdown's bold and code.
    """

    title: str
    caption: str
    headers: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Write the caption as a paragraph, and the table below it; the heading is left to the report."""
        grid = markdown(self.rows, self.headers)
        return f"{self.caption}\n\n{grid}" if self.caption else grid

    def latex(self) -> str:
        """Write a ``table`` environment with the rules of the package booktabs."""
        frame = pd.DataFrame(
            [[_latex(cell) for cell in row] for row in self.rows], columns=[_latex(head) for head in self.headers]
        )
        return str(
            frame.style.hide(axis="index").to_latex(
                hrules=True,
                position_float="centering",
                column_format="l" + "r" * (len(self.headers) - 1),
                caption=_latex(_plain(f"{self.title}. {self.caption}".strip())),
            )
        )

    def csv(self) -> str:
        """Write the cells without markup."""
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(
            [_plain(cell) for cell in row] for row in (self.headers, *self.rows)
        )
        return text.getvalue()


Part = str | Table
"""What a report is made of: paragraphs of Markdown, and tables."""


def markdown(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    """Write a table in Markdown as GitHub reads it."""
    cells = [[str(cell).replace("|", r"\|") for cell in row] for row in rows]
    return str(tabulate(cells, headers=headers, tablefmt="github", disable_numparse=True))


def shown_target(target: float) -> str:
    """Format a target as ``0.50``, or as ``0.125`` where two digits do not tell."""
    return f"{target:.2f}" if abs(round(target, 2) - target) < 1e-9 else f"{target:g}"


def _latex(text: str) -> str:
    bold = re.split(r"\*\*(.+?)\*\*", text)
    escaped = ["".join(ESCAPES.get(sign, sign) for sign in part.replace("`", "")) for part in bold]
    return "".join(rf"\textbf{{{part}}}" if i % 2 else part for i, part in enumerate(escaped))


def _plain(text: str) -> str:
    return text.replace("**", "").replace("`", "")
