"""Writes what `resting new` gives: a method that works, to be changed, and its test."""

from __future__ import annotations

import importlib.resources
import importlib.util
import keyword
import re
from pathlib import Path
from string import Template

from resting.benchmarks.cells import registry
from resting.benchmarks.errors import BenchmarkError

LONGEST = 30
"""Characters of a name: with more, lines of what is written are too long."""

PROJECT = ("pyproject.toml", "setup.py", "setup.cfg")
"""A folder with one of these files is a project already, whose build belongs to its authors."""


def in_checkout(name: str, folder: Path) -> list[Path]:
    """Writes `name` into the checkout of this project that `folder` lies in.

    Returns
    -------
    list of Path
        The method in ``baselines/``, its test in ``tests/``.

    Raises
    ------
    BenchmarkError
        If there is no checkout, the name will not do, or a file exists; nothing is written then.
    """
    words = _words(name)
    root = next((f for f in (folder, *folder.parents) if _is_checkout(f)), None)
    if root is None:
        raise BenchmarkError(f"{folder} is in no checkout of resting-neurons: go to one, or give --package DIR")
    elsewhere = "\n\nWhat every method owes its users, tests/sparsifier/test_conformance.py asks of it by itself.\n"
    return _write(
        {
            root / "baselines" / f"{words['module']}.py": _filled("method", words),
            root / "tests" / "baselines" / f"test_{words['module']}.py": _test("checkout_imports", elsewhere, words),
        }
    )


def package(name: str, folder: Path) -> list[Path]:
    """Writes `name` as a package of its own into `folder`; installed, it is found by its entry point.

    Parameters
    ----------
    name : str
    folder : Path
        A new folder, or one that has other files. Where it is a project already, only the method and its test are
        written, and `lines_to_add` says what its authors add.

    Returns
    -------
    list of Path
        What was written: the project file, the method and its test.

    Raises
    ------
    BenchmarkError
        If the name will not do, or a file exists; nothing is written then.
    """
    words = _words(name)
    module = words["module"]
    if importlib.util.find_spec(module) is not None or (folder / module).exists():
        raise BenchmarkError(f"name {name!r}: Python has a module {module} already; allowed: a name of its own")
    if folder.exists() and not folder.is_dir():
        raise BenchmarkError(f"--package {folder} is a file; allowed: a folder")
    project = {} if _is_project(folder) else {folder / "pyproject.toml": _filled("pyproject", words)}
    return _write(
        project
        | {
            folder / f"{module}.py": _filled("method", words),
            folder / "tests" / f"test_{module}.py": _test("package_imports", "", words),
        }
    )


def lines_to_add(written: list[Path]) -> str:
    """Says what the authors of an existing project add to it; empty where `package` wrote the project file."""
    if any(file.name in PROJECT for file in written):
        return ""
    module = written[0].stem
    return _filled("entry_point", _forms(module.replace("_", "-")) | {"folder": str(written[0].parent)})


def _is_project(folder: Path) -> bool:
    return any((folder / file).exists() for file in PROJECT)


def _words(name: str) -> dict[str, str]:
    """Gives what the templates ask for, of a name that is free and can be one of a module and of a class."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > LONGEST:
        raise BenchmarkError(
            f"name {name!r}; allowed: up to {LONGEST} lower-case letters and digits, with single '-' between words"
        )
    forms = _forms(name)
    module, cls = forms["module"], forms["cls"]
    taken = {"ClassVar", "Rule", "Site", "Sparsifier", "Statistics", "CalibratedModel", "Calibration"}
    if keyword.iskeyword(module) or keyword.iskeyword(cls) or cls in taken:
        raise BenchmarkError(f"name {name!r}: {module} or {cls} has a meaning already; allowed: a name of its own")
    if name in registry.named() or name in registry.skipped():
        raise BenchmarkError(f"name {name!r}: there is such a method; allowed: one that `resting list` does not show")
    return forms


def _forms(name: str) -> dict[str, str]:
    return {
        "name": name,
        "module": name.replace("-", "_"),
        "cls": "".join(word.capitalize() for word in name.split("-")),
        "title": name.replace("-", " ").capitalize(),
        "group": registry.GROUP,
    }


def _filled(template: str, words: dict[str, str]) -> str:
    text = (importlib.resources.files("resting.benchmarks.cli") / "templates" / f"{template}.tmpl").read_text("utf-8")
    return Template(text).substitute(words)


def _test(imports: str, elsewhere: str, words: dict[str, str]) -> str:
    return _filled("test", words | {"imports": _filled(imports, words).rstrip(), "elsewhere": elsewhere})


def _is_checkout(folder: Path) -> bool:
    return (
        all((folder / part / "__init__.py").is_file() for part in ("baselines", "sparsifier"))
        and (folder / "tests" / "sparsifier" / "test_conformance.py").is_file()
    )


def _write(files: dict[Path, str]) -> list[Path]:
    for file in files:
        if file.exists():
            raise BenchmarkError(f"{file} exists and is not overwritten: take another name")
        if not all(folder.is_dir() for folder in file.parents if folder.exists()):
            raise BenchmarkError(f"{file.parent} is a file where a folder belongs: move it away")
    for file, text in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return list(files)
