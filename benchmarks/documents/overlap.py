"""Finds what two texts have in common: nothing is measured on what was fitted on."""

from __future__ import annotations

from collections.abc import Sequence

LONG = 40
"""Characters from which on a line that two texts share is no accident."""
SHARED = 0.1
"""Share of a held-out text's long lines that may stand in the calibration text as well."""


def shared(fitted: Sequence[str], held_out: Sequence[str], short_ones_too: bool = True) -> str | None:
    """Say how much of `held_out` stands in `fitted`; None where it is no more than chance.

    Long lines tell, since two files cut their documents at different places.

    Parameters
    ----------
    fitted, held_out : sequence of str
        Documents.
    short_ones_too : bool
        Count documents that are shorter than `LONG`, too: paragraphs such as "Chapter 1" are in many texts.
    """
    seen = {line.strip() for document in fitted for line in document.splitlines()}
    lines = [line.strip() for document in held_out for line in document.splitlines() if len(line.strip()) >= LONG]
    both = sum(len(line) for line in lines if line in seen)
    whole = sum(len(line) for line in lines)
    same = {document for document in set(fitted) & set(held_out) if short_ones_too or len(document) >= LONG}
    if same:
        return "a document"
    return f"{both / whole:.0%}" if both > SHARED * whole else None
