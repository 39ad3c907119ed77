"""Triton's interpreter without the half of its work that changes nothing."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType

INTERPRETER = "triton.runtime.interpreter"


def leave_out_what_changes_nothing() -> None:
    """Make launches in the interpreter faster, where it is loaded: what they compute and refuse stays the same."""
    interpreter = sys.modules.get(INTERPRETER)
    if interpreter is not None and not hasattr(interpreter, "given"):
        _give_language_once_per_launch(interpreter)
        _compute_no_overflows_that_nobody_looks_at(interpreter)


def _give_language_once_per_launch(interpreter: ModuleType) -> None:
    """Let a launch replace the operations of `triton.language` once for each module whose functions it calls.

    The interpreter replaces them when a launch begins and again at every call of a function inside it; when the launch
    ends, it takes back what was replaced at the beginning. Only the first time in a module changes anything.
    """
    give, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    interpreter.given = given = set()

    def give_once(function):
        if id(function.__globals__) not in given:
            given.add(id(function.__globals__))
            return give(function)
        return None  # what a call inside a launch replaces, nobody takes back

    def begin(executor, *args, **kwargs):
        given.clear()
        try:
            return launch(executor, *args, **kwargs)
        finally:
            given.clear()

    interpreter._patch_lang = give_once
    interpreter.GridExecutor.__call__ = begin


def _compute_no_overflows_that_nobody_looks_at(interpreter: ModuleType) -> None:
    """Leave out a second sum in int64 beside every sum of integers: it goes to an assertion, which needs `debug`."""
    builder = interpreter.interpreter_builder
    if not builder.options.debug:
        builder.options = replace(builder.options, sanitize_overflow=False)
