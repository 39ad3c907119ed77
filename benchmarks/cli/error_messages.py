"""Turns errors that were foreseen into one sentence, whoever raised them."""

from __future__ import annotations

import re
from typing import Any

from resting.benchmarks.errors import BenchmarkError
from resting.sparsifier.errors import SparsifierError


def sentence(error: Exception) -> str | None:
    """Return what the command line prints of `error`; None where nobody foresaw it, and the traceback is of use."""
    if isinstance(error, BenchmarkError | SparsifierError):
        return " ".join(str(error).split())
    if isinstance(error, OSError):  # a full disk, a folder that may not be read: nothing that the code could mend
        path = error.filename2 or error.filename
        said = error.strerror or str(error)
        return f"{path}: {said}" if path else said
    if hasattr(error, "format_message"):  # the parser's; which package its classes are in depends on its version
        return _usage(error)
    return None


def _usage(error: Any) -> str:
    """A wrong command line: what the parser says, and what it would take."""
    command = getattr(error.ctx, "command", None) if getattr(error, "ctx", None) else None
    said = error.format_message().strip().rstrip(".")
    if type(error).__name__ == "NoArgsIsHelpError":
        said = "no command"
    elif type(error).__name__ == "NoSuchOption":
        said = f"there is no option {error.option_name!r}"
    elif type(error).__name__ == "MissingParameter" and error.param is not None:
        # Versions of the parser name it differently.
        said = f"Missing {error.param.param_type_name} {error.param.name!r}"
    said = re.sub(r"(Did you mean [^?]*\?) \1", r"\1", said)  # some say it twice
    if choice := _choice(said):
        return choice
    if command is None:
        return said
    if hasattr(command, "list_commands"):
        allowed = command.list_commands(error.ctx)
    else:
        allowed = [name for parameter in command.params for name in _shown(parameter)]
    return f"{' '.join(said.split())}; allowed: {', '.join([*allowed, '--help'])}"


def _choice(said: str) -> str | None:
    """A value that is none of an option's choices: the option, the value, and what is allowed."""
    found = re.fullmatch(r"Invalid value for '([^']+)': (?:Value error, )?('.*') is not one of (.+)", said)
    return f"{found[1].strip('[]')} {found[2]}; allowed: {found[3].replace(chr(39), '')}" if found else None


def _shown(parameter: Any) -> list[str]:
    return list(parameter.opts) if parameter.param_type_name == "option" else [parameter.name.upper()]
