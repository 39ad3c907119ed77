"""Puts what a person wrote about a run at the end of its README."""

from __future__ import annotations

from pathlib import Path

FILE = "NOTES.md"


def section(folder: Path) -> list[str]:
    """Read the notes of a results folder, as a section of its README; there is none without the file."""
    file = folder / FILE
    return [f"## Notes\n\n{file.read_text(encoding='utf-8-sig').strip()}"] if file.exists() else []
