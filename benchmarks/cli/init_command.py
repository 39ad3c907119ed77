"""Defines the command ``resting init``, which writes a suite to edit."""

from __future__ import annotations

import importlib.resources
import os
from pathlib import Path
from string import Template
from typing import Annotated

import typer

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.names import slug


def init(
    file: Annotated[Path, typer.Argument(help="File to write; it must not exist.")] = Path("suite.toml"),
) -> None:
    """Write a suite to edit, with a comment on every choice.

    It runs as it stands: resting run suite.toml
    """
    name = slug(file.stem)
    if file.suffix != ".toml":
        raise BenchmarkError(f"{file} does not end with .toml, as the file of a suite does; allowed: {file}.toml")
    if not name or not name.isascii():
        raise BenchmarkError(f"{file} gives a suite no name; allowed: a file named with letters a to z and digits")
    if os.path.lexists(file):
        raise BenchmarkError(f"{file} exists and is not overwritten: give another name")
    if not file.parent.is_dir():
        raise BenchmarkError(f"{file.parent} is no folder: make it, or give another one")
    template = (importlib.resources.files("resting.benchmarks.cli") / "templates" / "suite.tmpl").read_text("utf-8")
    file.write_text(Template(template).substitute(name=name, file=file), encoding="utf-8")
    print(f"wrote {file}")
    print(f"next: resting run {file} --dry-run")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command()(init)
