"""Writes one row per method into the page ``methods.md``, from the classes themselves."""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

MARK = "<!-- Every method stands here in the built documentation. -->"
ARXIV = re.compile(r"arXiv[: ](\d{4}\.\d{5})")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put the table in the place of `MARK`, on the one page that has it."""
    return markdown.replace(MARK, table()) if page.file.src_uri == "methods.md" else markdown


def table() -> str:
    """Write the methods of this project with variants, papers and files; none of what is installed beside it."""
    from resting.benchmarks.cells import registry

    classes = [cls for cls in registry.methods().values() if cls.__module__.startswith("resting.")]
    lines = ["| name | what it does | paper | file |", "|---|---|---|---|"]
    lines += [row(cls) for cls in sorted(classes, key=lambda cls: (cls.__module__, cls.name))]
    return "\n".join(lines)


def row(cls: Any) -> str:
    """Write one line of the table."""
    from resting.sparsifier import Compensated

    inside = "(...)" if issubclass(cls, Compensated) else ""
    names = ", ".join(f"`{name}{inside}`" for name in (cls.name, *cls.variants))
    first = " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())
    file = cls.__module__.removeprefix("resting.").replace(".", "/") + ".py"
    return f"| {names} | {first} | {paper(cls)} | `{file}` |"


def paper(cls: Any) -> str:
    """Link to the paper: what the class names, or else the first number that its docstrings have."""
    module = sys.modules[cls.__module__]
    said = getattr(cls, "paper", "") or " ".join([inspect.getdoc(cls) or "", inspect.getdoc(module) or ""])
    found = ARXIV.search(said)
    return f"[arXiv {found[1]}](https://arxiv.org/abs/{found[1]})" if found else ""
