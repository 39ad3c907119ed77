"""Tells what an object holds beyond the fields of its dataclass: files and kernels would lose it without a word."""

from __future__ import annotations

from dataclasses import fields
from typing import Any


def more_than_fields(what: str, part: Any, kind: type, where: str = "") -> list[str]:
    """Says in words what `part` is more than a `kind`: of a subclass, or with attributes that are no fields.

    Parameters
    ----------
    what, where : str
        What it is called, for instance ``"a rule"`` and ``"at 3.down"``.
    """
    found = []
    if type(part) is not kind:
        found.append(f"{what} of class {type(part).__name__}{f', {where},' if where else ''}")
    names = {field.name for field in fields(kind)}
    place = f" {where}" if where else ""
    return found + [f"{what}{place} with an attribute {name} of its own" for name in vars(part) if name not in names]
