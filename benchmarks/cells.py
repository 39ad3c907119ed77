"""A cell: one method at one target and seed on one model; its identity, its rows, its file."""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
from dataclasses import dataclass, field
from functools import cache as memoise
from pathlib import Path
from typing import Any

import baselines
import method as method_package
import sparsifier
from benchmarks.suite import MethodTable
from sparsifier import Compensated, Sparsifier, TokenPolicy


@dataclass(frozen=True)
class Cell:
    """What is to be measured, before it is.

    Attributes
    ----------
    table : MethodTable
        The suite's entry.
    sparsifier : Sparsifier
    seed : int
    tokens : TokenPolicy
        Sparse tokens of what is scored.
    """

    table: MethodTable
    sparsifier: Sparsifier
    seed: int
    tokens: TokenPolicy

    @property
    def label(self) -> str:
        return self.table.label or self.sparsifier.label

    @property
    def target(self) -> float:
        return self.sparsifier.target

    def key(self, setting: dict[str, Any]) -> str:
        """sha256 of all that determines the cell's values.

        Parameters
        ----------
        setting : dict
            What all cells of a run share: model, texts, windows, dtype.
        """
        identity = {
            "setting": setting,
            "tokens": str(self.tokens),
            "text": self.table.text,
            "method": self.sparsifier.spec(),
            "code": code_version(self.sparsifier),
        }
        return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


@dataclass
class Result:
    """What a cell measured.

    Attributes
    ----------
    status : str
        ``done``; ``skipped`` where a method cannot give a number; ``diverged`` where a number is not finite;
        ``missing`` where data were not to be had, ``failed`` and ``out-of-memory``, which are tried again at the next
        run. The reasons are in the rows, of failures in `info`.
    rows : list of dict
        One a metric, in the columns of results.csv.
    windows : dict
        Per-window sums behind a metric, for paired differences.
    items : dict
        Of tasks: metrics item by item.
    seconds : float
    """

    status: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    windows: dict[str, list[float]] = field(default_factory=dict)
    items: dict[str, list[float]] = field(default_factory=dict)
    seconds: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    measured_on: dict[str, Any] = field(default_factory=dict)


def code_version(method: Sparsifier) -> str:
    """sha256 of the code that computes a cell of `method`, without comments and docstrings.

    It covers the interface, the measurements, and the modules of the method, of what it wraps and of the classes
    they derive from, so that a changed formula makes a new cell while another new baseline, or a comment, does not.
    """
    return digest_of(common_files() | _own_files(method))


def shared_code_version(method: Sparsifier | None) -> str:
    """The same for what methods share: of all of this project's methods, and of `method` if it comes from outside."""
    files = common_files()
    for package in (baselines, method_package):
        files |= set(Path(inspect.getfile(package)).parent.glob("*.py"))
    return digest_of(files | _own_files(method))


def common_files() -> set[Path]:
    """The code that every cell depends on: the interface, models, texts, and what measures them."""
    from benchmarks import bench, measure, models, perplexity, texts

    modules = (bench, measure, models, perplexity, texts)
    interface = Path(inspect.getfile(sparsifier)).parent
    return (set(interface.rglob("*.py")) - speed_files()) | {Path(inspect.getfile(m)) for m in modules}


def speed_files() -> set[Path]:
    """The code that makes a plan fast and gives no quality figure: those come from the definition."""
    interface = Path(inspect.getfile(sparsifier)).parent
    definition = interface / "kernels" / "masked.py"
    return (set((interface / "kernels").glob("*.py")) | {interface / "decoding.py"}) - {definition}


def _own_files(method: Sparsifier | None) -> set[Path]:
    files: set[Path] = set()
    while method is not None:
        for base in type(method).__mro__:
            if base.__module__.startswith("method."):
                files |= set(Path(inspect.getfile(base)).parent.glob("*.py"))
            elif base.__module__ not in ("builtins", "abc"):
                files.add(Path(inspect.getfile(base)))
        method = method.inner if isinstance(method, Compensated) else None
    return files


def digest_of(files: set[Path]) -> str:
    """sha256 of the code of `files`, without comments and docstrings."""
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: (f.parent.name, f.name)):
        digest.update(f"{file.parent.name}/{file.name} {_meaning(file)}".encode())
    return digest.hexdigest()


@memoise
def _meaning(file: Path) -> str:
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            value = body[0].value
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                value.value = ""
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
