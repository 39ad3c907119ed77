"""Takes the labels of methods apart: a wrapper, the sparsifier inside it, and the variant."""

from __future__ import annotations

import re


def split(method: str) -> tuple[str, str, str]:
    """Split a label into wrapper, sparsifier and variant.

    ``"spon(teal), 400 steps"`` and ``"spon(teal, 400 steps)"`` give ``("spon", "teal", "400 steps")``, and ``"teal"``
    gives ``("", "teal", "")``.
    """
    name, variant = cut(method)
    inner = re.fullmatch(r"(.+?)\((.*)\)", name)
    if not inner:
        return "", name, variant
    _, base, own = split(inner[2])
    return inner[1].strip(), base, ", ".join(filter(None, (own, variant)))


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
    while inner := re.fullmatch(r"(.+?)\((.*)\)", cut(found or method)[0]):
        found = inner[2].strip()
    return found
