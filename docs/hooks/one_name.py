"""Lays the package out as it is imported, so that the API pages find `resting.sparsifier` and its siblings.

Folders stand at the top of the repository and are mapped to `resting.*` when they are installed; mkdocstrings reads
files and follows no such map. Formulas of docstrings are reStructuredText there, and Markdown in the copy.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import textwrap
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parents[2]
ROOMS = ("sparsifier", "baselines", "method", "benchmarks")
LAID_OUT: list[Path] = []


@event_priority(100)  # before mkdocstrings looks at its own options
def on_config(config: Any) -> Any:
    """Copy the sources into a folder of their own, and let mkdocstrings read that."""
    folder = Path(tempfile.mkdtemp(prefix="resting-docs-"))
    LAID_OUT.append(folder)
    shutil.copytree(ROOT / "resting", folder / "resting", ignore=shutil.ignore_patterns("__pycache__"))
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / "resting" / room, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (folder / "resting").rglob("*.py"):
        text = path.read_text()
        if "math::" in text or ":math:" in text:
            path.write_text(formulas(text))
    config.plugins["mkdocstrings"].config["handlers"]["python"]["paths"] = [str(folder)]
    return config


DISPLAYED = re.compile(r"^( *)\.\. math::(.*(?:\n\1 +\S.*)*)", re.MULTILINE)
INLINE = re.compile(r":math:`([^`]+)`")


def formulas(text: str) -> str:
    """Write ``.. math::`` and ``:math:`` as the marks that pymdownx.arithmatex knows."""

    def displayed(found: re.Match[str]) -> str:
        formula = " ".join(textwrap.dedent(found[2]).split())
        return f"{found[1]}\\[{formula}\\]"

    return INLINE.sub(lambda found: f"\\({found[1]}\\)", DISPLAYED.sub(displayed, text))


def on_post_build(config: Any) -> None:
    """Remove what `on_config` copied."""
    _clear()


def on_build_error(error: Exception) -> None:
    """Remove it where the build fails, too."""
    _clear()


def _clear() -> None:
    while LAID_OUT:
        shutil.rmtree(LAID_OUT.pop(), ignore_errors=True)
