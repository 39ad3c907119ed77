"""Finds methods: the classes in `baselines` and `method`, and those named on the command line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import os
import pkgutil
import re
import sys
from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

import baselines
import method
from benchmarks.errors import SuiteError
from sparsifier import Compensated, Sparsifier, SparsifierError


def methods() -> dict[str, type[Sparsifier]]:
    """All concrete sparsifiers of this project, by name."""
    found: dict[str, type[Sparsifier]] = {}
    for package in (baselines, method):
        for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            module = importlib.import_module(info.name)
            for cls in vars(module).values():
                if _is_method(cls) and cls.__module__ == info.name:
                    found[cls.name] = cls
    return found


def named(extra: Mapping[str, type[Sparsifier]] | None = None) -> dict[str, tuple[type[Sparsifier], dict[str, Any]]]:
    """All names that suites may use, with class and parameters: methods, and their variants (`Sparsifier.variants`)."""
    known = methods() | dict(extra or {})
    variants = {name: (cls, dict(values)) for cls in known.values() for name, values in cls.variants.items()}
    return variants | {name: (cls, {}) for name, cls in known.items()}


def load_class(path: str) -> type[Sparsifier]:
    """The sparsifier at ``package.module:Class``."""
    name, _, attribute = path.partition(":")
    if not name or not attribute:
        raise SuiteError(f"--method takes package.module:Class, got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a console script does not look in the present folder
    try:
        cls = getattr(importlib.import_module(name), attribute)
    except Exception as error:
        raise SuiteError(f"--method {path}: {error}") from error
    if not _is_method(cls):
        raise SuiteError(f"--method {path} is not a concrete subclass of sparsifier.Sparsifier with a name")
    return cls


def build(
    expression: str,
    target: float,
    parameters: Mapping[str, Any] | None = None,
    extra: Mapping[str, type[Sparsifier]] | None = None,
    inner: Mapping[str, Any] | None = None,
) -> Sparsifier:
    """A sparsifier from its expression.

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
    known = named(extra)
    match = re.fullmatch(r"\s*([\w.-]+)\s*(?:\((.*)\))?\s*", expression)
    if not match or match[1] not in known:
        name = match[1] if match else expression
        near = difflib.get_close_matches(name, known, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise SuiteError(f"unknown method {name!r}{hint}; allowed: {', '.join(sorted(known))}")
    (cls, preset), inside = known[match[1]], match[2]
    if issubclass(cls, Compensated) != (inside is not None):
        shape = f"{cls.name}(METHOD)" if issubclass(cls, Compensated) else cls.name
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
    hints = get_type_hints(cls)
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


def _is_method(cls: object) -> bool:
    return (
        inspect.isclass(cls)
        and issubclass(cls, Sparsifier)
        and not inspect.isabstract(cls)
        and isinstance(getattr(cls, "name", None), str)
    )
