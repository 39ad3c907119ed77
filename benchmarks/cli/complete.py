"""Completes names on the command line, without loading torch: a shell waits for every key."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
from pathlib import Path

GROUP = "resting.sparsifiers"
"""The group of `registry.GROUP`, which takes seconds to import."""


def suites(incomplete: str) -> list[str]:
    """Complete the name of a suite."""
    folder = Path(__file__).parents[1] / "suites"
    return _fitting(sorted(path.stem for path in folder.glob("*.toml")), incomplete)


def methods(incomplete: str) -> list[str]:
    """Complete the last of several names of methods with commas between them."""
    before, comma, last = incomplete.rpartition(",")
    return [f"{before}{comma}{name}" for name in _fitting(method_names(), last)]


def method(incomplete: str) -> list[str]:
    """Complete the name of one method."""
    return _fitting(method_names(), incomplete)


def models(incomplete: str) -> list[str]:
    """Complete the name of a model that has one; folders and files are the shell's own business."""
    return _fitting(["smollm2-135m"], incomplete)


def method_names() -> list[str]:
    """Find the names of methods and their variants in the source of this project, and of installed entry points."""
    found: set[str] = set()
    for package in ("resting.baselines", "resting.method"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec is not None else []:
            for file in sorted(Path(folder).glob("*.py")):
                found |= _names(file)
    return sorted(found | {entry.name for entry in importlib.metadata.entry_points(group=GROUP)})


def _names(file: Path) -> set[str]:
    """Values of `name`, and keys of `variants`, in the classes of a file."""
    found: set[str] = set()
    for part in ast.parse(file.read_bytes()).body:
        values: dict[str, ast.expr | None] = {}
        for line in part.body if isinstance(part, ast.ClassDef) else []:
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                values[line.target.id] = line.value
            elif isinstance(line, ast.Assign) and isinstance(line.targets[0], ast.Name):
                values[line.targets[0].id] = line.value
        name, variants = values.get("name"), values.get("variants")
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            found.add(name.value)
            keys = variants.keys if isinstance(variants, ast.Dict) else []
            found |= {str(key.value) for key in keys if isinstance(key, ast.Constant)}
    return found


def _fitting(names: list[str], incomplete: str) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]
