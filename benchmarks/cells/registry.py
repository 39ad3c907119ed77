"""Finds methods: the classes in `baselines` and `method`, those of installed packages, and those named on the command
line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Mapping
from functools import cache as memoise
from typing import Any, TypeGuard, get_type_hints

from pydantic import TypeAdapter, ValidationError

import resting.baselines as baselines
import resting.method as method
from resting.benchmarks.errors import SuiteError, first_line
from resting.sparsifier import Compensated, Sparsifier, SparsifierError

GROUP = "resting.sparsifiers"
"""Entry points of this group are methods: the method's name, and ``module:Class``."""
LONGEST = 1000
"""Characters of a method's expression."""


def methods() -> dict[str, type[Sparsifier]]:
    """Return all concrete sparsifiers of this project and of installed packages, by name."""
    return _found(tuple(sys.path))[0] | {}


def skipped() -> dict[str, str]:
    """Return what could not be loaded, with the reason: entry points by name, files of this project by module."""
    return _found(tuple(sys.path))[1] | {}


@memoise
def _found(path: tuple[str, ...]) -> tuple[dict[str, type[Sparsifier]], dict[str, str]]:
    """Methods and reasons; looked for once a `path`, since every cell asks and metadata are read from the disk."""
    found: dict[str, type[Sparsifier]] = {}
    reasons: dict[str, str] = {}
    for package in (baselines, method):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            try:
                module = importlib.import_module(info.name)
            except (Exception, SystemExit) as error:
                reasons[info.name] = f"{type(error).__name__}: {first_line(error)}"
                continue
            for cls in vars(module).values():
                if _is_method(cls) and cls.__module__ == info.name:
                    found[cls.name] = cls
    own = set(found) | {name for cls in found.values() for name in cls.variants}
    for entry in sorted(importlib.metadata.entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        try:
            found[entry.name] = _installed(entry, own, found)
        except (Exception, SystemExit) as error:  # whatever its code does, the others are not touched by it
            kind = "" if isinstance(error, SuiteError) else f"{type(error).__name__}: "
            reasons[entry.name] = f"{kind}{first_line(error)} (entry point {entry.value!r}{_from(entry)})"
    return found, reasons


def _installed(
    entry: importlib.metadata.EntryPoint, own: set[str], found: Mapping[str, type[Sparsifier]]
) -> type[Sparsifier]:
    if entry.name in own:
        raise SuiteError("a method of this project has this name")
    if entry.name in found:
        raise SuiteError(f"{found[entry.name].__module__} has a method of this name as well")
    cls = entry.load()
    if problem := _problem(cls):
        raise SuiteError(problem)
    if cls.name != entry.name:
        raise SuiteError(f"the class is named {cls.name!r}: entry point and class must agree")
    if taken := own & set(cls.variants):
        raise SuiteError(f"its variant {min(taken)!r} is a method of this project")
    return cls


def _from(entry: importlib.metadata.EntryPoint) -> str:
    return f" of {entry.dist.name}" if entry.dist is not None else ""


def named(extra: Mapping[str, type[Sparsifier]] | None = None) -> dict[str, tuple[type[Sparsifier], dict[str, Any]]]:
    """Return all names that suites may use, with class and parameters: methods, and their variants."""
    known = methods() | dict(extra or {})
    variants = {name: (cls, dict(values)) for cls in known.values() for name, values in cls.variants.items()}
    return variants | {name: (cls, {}) for name, cls in known.items()}


def completed(name: str, extra: Mapping[str, type[Sparsifier]] | None = None) -> str:
    """Return the expression of a method: a wrapper that is named alone wraps teal, any other name is one already."""
    plain = "".join(name.split())
    known = named(extra).get(plain)
    return f"{plain}(teal)" if known is not None and issubclass(known[0], Compensated) else plain


def summary(cls: type[Sparsifier], name: str) -> str:
    """Say in one line what a method does; of a variant first what it sets."""
    lines = (inspect.getdoc(cls) or "").strip().splitlines() or [""]
    preset = {} if name == cls.name else cls.variants.get(name, {})
    settings = ", ".join(f"{key} = {_plain(value)}" for key, value in preset.items())
    return f"{cls.name} with {settings}: {lines[0]}" if settings else lines[0]


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def load_class(path: str) -> type[Sparsifier]:
    """Load the sparsifier at ``module:Class`` or ``module.Class``; the module may lie in packages."""
    name, _, attribute = path.partition(":") if ":" in path else path.rpartition(".")
    if not name or not attribute:
        raise SuiteError(f"--method takes package.module:Class, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not look in the present folder
    try:
        cls = getattr(importlib.import_module(name), attribute)
    except (Exception, SystemExit) as error:
        raise SuiteError(f"--method {path}: {first_line(error)}") from error
    if problem := _problem(cls):
        raise SuiteError(f"--method {path} {problem}")
    return cls


def build(
    expression: str,
    target: float,
    parameters: Mapping[str, Any] | None = None,
    extra: Mapping[str, type[Sparsifier]] | None = None,
    inner: Mapping[str, Any] | None = None,
) -> Sparsifier:
    """Build a sparsifier from its expression.

    Parameters
    ----------
    expression : str
        ``teal``, or a wrapper with what it wraps: ``spon(teal)``.
    target : float
    parameters : mapping
        Of the outermost method.
    extra : mapping
        Methods from outside, by name.
    inner : mapping
        Parameters of the method that is wrapped, the innermost one.

    Raises
    ------
    SuiteError
        If a method or a parameter is unknown, or a value is not allowed; the message names what is.
    """
    if len(expression) > LONGEST:  # and so nested deeper than anything is
        raise SuiteError(f"method {expression[:40]!r}...: {len(expression)} characters; allowed: {LONGEST}")
    known = named(extra)
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", expression)
    if not match or match[1] not in known:
        name = match[1] if match else expression
        if name in (reasons := skipped()):
            raise SuiteError(f"method {name!r} is skipped: {reasons[name]}")
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        left_out = f"; skipped: {', '.join(sorted(reasons))}" if reasons else ""
        raise SuiteError(f"unknown method {name!r}{hint}; allowed: {', '.join(sorted(known))}{left_out}")
    (cls, preset), inside = known[match[1]], match[2]
    if issubclass(cls, Compensated) != (inside is not None):
        shape = f"{match[1]}(METHOD)" if issubclass(cls, Compensated) else match[1]
        raise SuiteError(f"method {expression!r} must be written {shape}")
    given = parameters
    if inside is None and parameters is None:
        given = inner
    elif inside is None and inner:
        raise SuiteError(f"method {expression!r} wraps nothing: `inner` has no meaning for it")
    values = dict(given or {})
    for key in preset.keys() & values.keys():
        raise SuiteError(f"method {expression!r} has {key} = {preset[key]!r} by its name: leave {key!r} out")
    values |= preset
    allowed = [f.name for f in dataclasses.fields(cls) if f.init and f.name not in ("target", "inner")]
    for key in values:
        if key not in allowed:
            raise SuiteError(f"method {expression!r} has no parameter {key!r}; allowed: {', '.join(allowed) or 'none'}")
    hints = get_type_hints(cls) if values else {}
    for key, value in values.items():
        try:
            values[key] = TypeAdapter(hints[key]).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise SuiteError(f"method {expression!r}: {key} = {value!r}: {reason}") from None
    try:
        if inside is not None:
            return cls(inner=build(inside, target, None, extra, inner), **values)  # type: ignore[call-arg]
        return cls(**({"target": target} | values))
    except (SparsifierError, TypeError) as error:
        raise SuiteError(f"method {expression!r}: {error}") from error


def _is_method(cls: object) -> TypeGuard[type[Sparsifier]]:
    return (
        inspect.isclass(cls)
        and issubclass(cls, Sparsifier)
        and not inspect.isabstract(cls)
        and isinstance(getattr(cls, "name", None), str)
    )


def _problem(cls: object) -> str | None:
    """Why `cls` is no method, as what follows its name."""
    if not _is_method(cls):
        return "is not a concrete subclass of resting.Sparsifier with a name"
    if not re.fullmatch(r"[\w.-]+", cls.name):
        return f"is named {cls.name!r}; allowed: letters, digits, '_', '-' and '.'"
    if not isinstance(cls.variants, Mapping):
        return f"has variants = {cls.variants!r}; allowed: a mapping of names to parameters"
    return None
