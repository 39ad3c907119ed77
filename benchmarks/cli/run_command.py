"""Defines the command ``resting run``."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from resting.benchmarks.cli import complete, show
from resting.benchmarks.cli.options import (
    Dtype,
    Output,
    TrustRemoteCode,
    check_device,
    check_model,
    listed,
    numbers,
    pairs,
    seeds_of,
)
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.sweep.mode import ExecutorName, Mode

EXAMPLE = "Example:  resting run baselines --methods teal,spon-refined --targets 0.4,0.5 --windows 16 --seeds 3"
CHOICES = "In place of the suite's own choices"


def run(
    suite: Annotated[
        list[str], typer.Argument(help="Names of suites, or paths of TOML files.", autocompletion=complete.suites)
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Local folder, .gguf file, or hub id, in place of the suite's model.", autocompletion=complete.models
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A sparsifier from outside, module:Class; may be repeated."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            help="Names of methods with commas between them; a wrapper alone wraps teal.",
            autocompletion=complete.methods,
            rich_help_panel=CHOICES,
        ),
    ] = None,
    targets: Annotated[str | None, typer.Option(help="Targets, such as 0.4,0.5.", rich_help_panel=CHOICES)] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="How many seeds, such as 3 (these are 0, 1, 2), or which, such as 5,7.", rich_help_panel=CHOICES
        ),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="How many windows of every text are measured on.", rich_help_panel=CHOICES)
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="How many tokens such a window has.", rich_help_panel=CHOICES)
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="Texts to measure on: names, files and hub:... with commas between them.", rich_help_panel=CHOICES
        ),
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Text to fit on: a name, a file, or hub:...", rich_help_panel=CHOICES)
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Formats of block linears: as-is,int8,int4-g128,...", rich_help_panel=CHOICES),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the changed suite and of its results folder.", rich_help_panel=CHOICES)
    ] = None,
    text: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE: a text to measure on, or the file of one that the suite names; may be repeated."),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a model over all GPUs.")] = "cpu",
    dtype: Annotated[
        Dtype | None, typer.Option(help="Dtype in place of the suite's; not every CPU is fast in bfloat16.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    output: Output = Path("results"),
    mode: Annotated[
        Mode, typer.Option(help="Run what is missing; write tables of what is in the store; or run all again.")
    ] = Mode.ONLY_MISSING,
    executor: Annotated[
        ExecutorName,
        typer.Option(
            help="Who runs jobs, one per model and method: this process, others here, Slurm by submitit, or Ray."
        ),
    ] = ExecutorName.SERIAL,
    workers: Annotated[int, typer.Option(min=1, help="Jobs at once; processes and ray let them share GPUs.")] = 1,
    executor_parameter: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE for submitit, such as slurm_partition=gpu; may be repeated.")
    ] = None,
    shard: Annotated[
        str | None, typer.Option(help="PART/PARTS, such as 2/8: run this part only; `resting merge` joins the stores.")
    ] = None,
    log: Annotated[Path | None, typer.Option(help="File that gets a line of JSON for everything that happens.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print every cell, what would be downloaded, and the memory and time needed."),
    ] = False,
) -> None:
    """Run SUITE...: fetch what is missing, measure what is not cached, write tables and plots."""
    from resting.benchmarks import run as runner
    from resting.benchmarks.cells import expand, registry
    from resting.benchmarks.cells import suite_file as suites
    from resting.benchmarks.cells.choices import Choices, changed
    from resting.benchmarks.cells.options import Options
    from resting.benchmarks.cli import dry_run as plans
    from resting.benchmarks.errors import FailedCells
    from resting.benchmarks.events import JsonLines
    from resting.benchmarks.latency.setting import check_replaced, timed_on
    from resting.benchmarks.progress import Console
    from resting.benchmarks.sweep.execution import Execution
    from resting.benchmarks.sweep.output import check_writable

    if dry_run and shard is not None:
        raise BenchmarkError(f"--shard {shard}: --dry-run lists all parts; allowed: one of the two")
    check_device(device, auto=True, measures=dry_run or mode is not Mode.ONLY_CACHE)
    check_model(model)
    files = pairs(text or [])
    chosen = Choices(
        methods=listed(methods, "--methods"),
        targets=numbers(targets, "--targets"),
        seeds=seeds_of(seeds),
        windows=windows,
        window=window,
        texts=listed(texts, "--texts"),
        calibration=calibration,
        weights=listed(weights, "--weights"),
        files=files,
        name=name,
    )
    if name is not None and len(suite) > 1:
        raise BenchmarkError(f"--name {name}: {len(suite)} suites cannot share a folder; allowed: one suite")
    parameters = pairs(executor_parameter or [], "--executor-parameter", "VALUE")
    execution = Execution(mode, executor, workers, Execution.parse_shard(shard), parameters)
    outside = tuple(registry.load_class(path) for path in method or [])
    loaded = [changed(suites.load(one), chosen) for one in suite]
    for one in loaded:
        check_writable(output / one.name)
        check_replaced(one, model, None if dtype is None else dtype.value)
        execution.check(one)
        if one.latency is not None:
            timed_on(one, device)
    cells = [expand.cells_of(one, outside) for one in loaded]  # a wrong method ends here, before anything is fetched
    kind = None if dtype is None else dtype.value
    options = Options(output, model, device, kind, files, outside, trust_remote_code)
    if dry_run:
        for one, of in zip(loaded, cells):
            print("\n".join(plans.lines(one, [model] if model else one.models, of, options)))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is finished is then written
    on_event = None if log is None else JsonLines(log)
    incomplete = False
    for one in loaded:
        console = Console()
        try:
            if one.changed:
                console.say(f"suite {one.changed['suite']} is changed: its results go to {output / one.name}")
            folder = runner.run(one, options, console, execution, on_event)
            if (folder / "README.md").exists():  # a shard writes none while other parts are missing
                show.folder(folder)
        except FailedCells as error:  # the other suites are run all the same
            console.say(str(error))
            incomplete = True
        finally:
            console.end()
    if incomplete:
        raise FailedCells("some cells have no result: they are listed above")


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog=EXAMPLE)(run)
