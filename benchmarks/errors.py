"""Errors that end a command with one sentence."""

from __future__ import annotations


class BenchmarkError(Exception):
    """Base: bad input or a missing thing; the command line prints it and exits with `code`."""

    code = 2


class AssetError(BenchmarkError):
    """A model or a text cannot be had, or is not what its hash says."""


class ModelError(BenchmarkError):
    """A model that is there cannot be used; unlike a missing one it ends a run."""


class SuiteError(BenchmarkError):
    """A suite file is wrong; the message names the key, the value and what is allowed."""


class FitError(BenchmarkError):
    """A fit is asked for what cannot be: a target, a method, a text or a folder that will not do."""


class FailedCells(BenchmarkError):
    """A run is through, and some of its cells have no result, or numbers that should agree do not."""

    code = 1


def first_line(error: BaseException) -> str:
    """Return what `error` says, in one line; its type where it says nothing."""
    lines = str(error).strip().splitlines()
    return " ".join(lines[0].split()) if lines else type(error).__name__
