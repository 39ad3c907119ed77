"""What the commands of ``resting`` share."""

from __future__ import annotations

import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from resting.benchmarks.errors import BenchmarkError

Output = Annotated[Path, typer.Option(help="Folder for results.")]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the Python code that a model's folder or hub page brings.")
]


class Dtype(StrEnum):
    """Names a dtype that a model can be loaded in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def pairs(values: list[str], option: str = "--text", right: str = "FILE") -> dict[str, str]:
    """Options of the form ``NAME=VALUE``.

    Raises
    ------
    BenchmarkError
    """
    for value in values:
        if not all(value.partition("=")):
            raise BenchmarkError(f"{option} takes NAME={right}, got {value!r}")
    names = [value.partition("=")[0] for value in values]
    for name in names:
        if names.count(name) > 1:
            raise BenchmarkError(f"{option} {name}={right} is given twice; allowed: once")
    return dict(value.split("=", 1) for value in values)


def listed(value: str | None, option: str) -> list[str] | None:
    """Options of several names with commas between them; commas in brackets are part of a name.

    Raises
    ------
    BenchmarkError
    """
    if value is None:
        return None
    found = [part.strip() for part in re.split(r",(?![^()]*\))", value)]
    if not all(found):
        raise BenchmarkError(f"{option} {value!r}: a name is missing; allowed: names with commas between them")
    return found


def numbers(value: str | None, option: str) -> list[float] | None:
    """Options of several numbers with commas between them.

    Raises
    ------
    BenchmarkError
    """
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise BenchmarkError(
            f"{option} {value!r}; allowed: numbers with commas between them, such as 0.4,0.5"
        ) from None


def seeds_of(value: str | None) -> list[int] | None:
    """Seeds: one number says how many, several say which.

    Raises
    ------
    BenchmarkError
    """
    if value is None:
        return None
    parts = [part.strip() for part in value.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts) or (
        len(parts) == 1 and not 1 <= int(parts[0]) <= 1000
    ):
        raise BenchmarkError(f"--seeds {value!r}; allowed: how many, such as 3, or which, such as 0,5,7")
    found = [int(part) for part in parts]
    return found if len(found) > 1 else list(range(found[0]))


def check_model(model: str | None) -> None:
    """Refuse the empty name of a model.

    Raises
    ------
    BenchmarkError
    """
    if model is not None and not model.strip():
        raise BenchmarkError(f"--model {model!r} names none; allowed: a folder, a .gguf file, organisation/name")


def check_device(device: str, auto: bool = False, measures: bool = True) -> None:
    """Refuse a device that is not here.

    Parameters
    ----------
    device : str
    auto : bool
        Whether ``auto`` is allowed.
    measures : bool
        Whether anything runs on it: what ``cuda`` measured elsewhere can be looked up anywhere.

    Raises
    ------
    BenchmarkError
    """
    import torch

    if device.split(":")[0] == "cuda" and not measures:
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["auto"] if auto else []), *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device not in known:
        allowed = f"cpu, cuda, cuda:0 to cuda:{count - 1}" if count else "cpu (no CUDA device here)"
        raise BenchmarkError(f"--device {device!r}; allowed: {allowed}")
