"""What the commands of ``resting`` share."""

from __future__ import annotations

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
    """Names a dtype that models can be run in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def check_model(model: str | None) -> None:
    """Refuse the name of no model.

    Raises
    ------
    BenchmarkError
    """
    if model is not None and not model.strip():
        raise BenchmarkError(f"--model {model!r} names none; allowed: a folder, a .gguf file, organisation/name")


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


def check_device(device: str, auto: bool = False) -> None:
    """Refuse a device that is not here.

    Raises
    ------
    BenchmarkError
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    known = ["cpu", *(["auto"] if auto else []), *(["cuda"] if count else []), *(f"cuda:{i}" for i in range(count))]
    if device not in known:
        allowed = f"cpu, cuda, cuda:0 to cuda:{count - 1}" if count else "cpu (no CUDA device here)"
        raise BenchmarkError(f"--device {device!r}; allowed: {allowed}")
