"""Turns what a user calls a method into a sparsifier, and refuses what cannot be fitted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from resting.benchmarks.cells import registry
from resting.benchmarks.errors import FitError
from resting.sparsifier import Compensated, Sparsifier

TARGET = 0.5
"""Share of the bytes that is left unread where nothing else is asked for."""


def method_of(
    method: str | Sparsifier,
    target: float | None = None,
    steps: int | None = None,
    seed: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    inner: Mapping[str, Any] | None = None,
) -> Sparsifier:
    """Build the sparsifier that is fitted; one that is given is checked.

    Parameters
    ----------
    method : str or Sparsifier
        An expression as suites have it, such as ``spon-refined(teal)`` (`registry.build`).
    target : float, optional
        `TARGET`, or that of a given sparsifier, where None.
    steps, seed : int, optional
        Parameters of the outermost method that have an option of their own.
    parameters, inner : mapping, optional
        Parameters of the outermost and of the innermost method.

    Raises
    ------
    SuiteError
        If the method or a parameter is unknown, or a value is not allowed.
    FitError
        If the target is not between 0 and 1, or a given sparsifier is to be changed.
    """
    given = {key: value for key, value in (("steps", steps), ("seed", seed)) if value is not None}
    if isinstance(method, Sparsifier):
        if target is not None and target != method.target:
            raise FitError(f"target = {target}: {method.label} was made with target = {method.target}; leave one out")
        if named := [*given, *(["parameters"] if parameters else []), *(["inner"] if inner else [])]:
            raise FitError(f"{named[0]} has no meaning for a method that is made already; give the method by its name")
        built = method
    elif isinstance(method, str):
        target = TARGET if target is None else target
        _check(target)
        if twice := given.keys() & (parameters or {}).keys():
            raise FitError(f"{min(twice)} is given twice: once alone and once in the parameters; allowed: once")
        if "".join(method.split()) == "dense":
            raise FitError("method 'dense' leaves nothing unread; allowed: any other method")
        wraps = "(" in method
        values = dict(parameters or {}) | given
        built = registry.build(method, target, values if values or wraps else None, None, inner)
    else:
        raise FitError(f"method must be a name such as 'teal' or a resting.Sparsifier, got {type(method).__name__}")
    _check(built.target)
    if built.protocol != "common":
        raise FitError(
            f"{built.label} follows the protocol {built.protocol!r}, which suites run; allowed: protocol = 'common'"
        )
    return built


def _check(target: Any) -> None:
    if isinstance(target, bool) or not isinstance(target, int | float) or not 0.0 < target < 1.0:
        raise FitError(f"target = {target!r}: must be a number between 0 and 1, the share of bytes left unread")


def check_window(method: Sparsifier, window: int) -> None:
    """Refuse calibration windows that are shorter than what a method trains on.

    Raises
    ------
    FitError
        Names both lengths.
    """
    part: Sparsifier | None = method
    while part is not None:
        trained = getattr(part, "window", None) if hasattr(part, "steps") else None
        if isinstance(trained, int) and window < trained:
            raise FitError(
                f"window = {window}: {method.label} trains on windows of {trained} tokens; allowed: {trained} and "
                f"more, or the parameter window = {window} of the method"
            )
        part = part.inner if isinstance(part, Compensated) else None
