"""What the page says of every method: one line, its paper, its code, and how it is drawn."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import resting.baselines as baselines
from resting.benchmarks import labels
from resting.benchmarks.cells import registry
from resting.benchmarks.report import style
from resting.sparsifier import Sparsifier

ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{4,5})")
ROOT = Path(baselines.__file__).resolve().parents[1]


def about(labels: list[str], repository: str) -> list[dict[str, Any]]:
    """Describe the methods that `labels` are of, outermost names once, in the order of every legend.

    Parameters
    ----------
    labels : list of str
        As rows have them, also wrapped and with variants.
    repository : str
        What a path in the repository stands behind to be a link.
    """
    names = dict.fromkeys(name for label in labels for name in _names(label))
    known = registry.methods()
    classes = {n: cls for m, cls in known.items() for n in (m, *cls.variants)}
    out = []
    for name in style.in_order(n for n in names if n != "dense"):
        cls = classes.get(name) or classes.get(name.split("-")[0])
        out.append({"name": name, **_described(cls, repository)})
    return out


def looks(labels: list[str]) -> dict[str, list[Any]]:
    """Return colour, marker, fill, dashes and width by label."""
    return {
        label: [one.colour, one.marker, one.fill, " ".join(f"{n * 1.4:g}" for n in one.dash), one.width]
        for label, one in style.styles(style.in_order(labels)).items()
    }


def _names(label: str) -> list[str]:
    wrapper, base, _ = labels.split(label)
    outer = re.sub(r"\(.*", "", wrapper)
    return [name for name in (outer, base) if name]


def _described(cls: type[Sparsifier] | None, repository: str) -> dict[str, Any]:
    if cls is None:  # measured elsewhere, by a method that is not installed here
        return {"line": "", "paper": "", "arxiv": "", "code": "", "bound": False}
    module = inspect.getmodule(cls)
    said = f"{getattr(cls, 'paper', '')} {cls.__doc__ or ''} {getattr(module, '__doc__', '') or ''}"
    number = ARXIV.search(said)
    file = Path(inspect.getfile(cls)).resolve()
    code = f"{repository}{file.relative_to(ROOT).as_posix()}" if file.is_relative_to(ROOT) else ""
    first = (cls.__doc__ or "").strip().split("\n\n")[0]
    return {
        "line": " ".join(first.split()),
        "paper": f"https://arxiv.org/abs/{number[1]}" if number else "",
        "arxiv": number[1] if number else "",
        "code": code,
        "bound": cls.is_bound,
    }
