"""Takes the labels of methods apart: a wrapper, the sparsifier inside it, and the variant."""

from __future__ import annotations

import re


def split(method: str) -> tuple[str, str, str]:
    """Split a label into wrapper, sparsifier and variant.

    ``"spon(teal), 400 steps"`` and ``"spon(teal, 400 steps)"`` give ``("spon", "teal", "400 steps")``, and ``"teal"``
    gives ``("", "teal", "")``.
    """
    if (opened := _opened(method)) is None:
        return "", *cut(method)
    wrapper, inside, variant = opened
    _, base, own = split(inside)
    return wrapper, base, ", ".join(filter(None, (own, variant)))


def cut(method: str) -> tuple[str, str]:
    """Cut a label at the first comma that is in no brackets, into the method and its variant."""
    depth = 0
    for place, letter in enumerate(method):
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth <= 0:
            return method[:place].strip(), method[place + 1 :].strip()
    return method.strip(), ""


def innermost(method: str) -> str:
    """Find the sparsifier at the bottom of a label: ``"spon(teal), 400 steps"`` gives ``"teal"``."""
    return split(method)[1]


def wrapped(method: str) -> str:
    """Find the label of the sparsifier at the bottom, with its variant; nothing where none is wrapped.

    ``"spon(teal, nominal), 400 steps"`` gives ``"teal, nominal"``.
    """
    found = ""
    while opened := _opened(found or method):
        found = opened[1]
    return found


def _opened(method: str) -> tuple[str, str, str] | None:
    """Take a wrapper off: what it is, the label inside its brackets, and the variant; None where none wraps."""
    name, variant = cut(method)
    found = re.fullmatch(r"(.+?)\((.*)\)", name)
    return (found[1].strip(), found[2].strip(), variant) if found else None
