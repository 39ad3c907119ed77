"""Defines the commands that look at results: joining, comparing, verifying, guarding."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resting.benchmarks.cli import complete
from resting.benchmarks.cli.options import Output, check_device, pairs


def merge(
    store: Annotated[list[Path], typer.Argument(help="Cache folders of other machines, or their cells/ folders.")],
) -> None:
    """Join the finished cells of other machines' STOREs into this one; contradictions are listed, ours are kept."""
    from resting.benchmarks.errors import FailedCells
    from resting.benchmarks.sweep.merge import merge as joined
    from resting.benchmarks.sweep.store import Store

    found = joined(Store.default(), store)
    print(f"{found.added} cells added, {found.same} were here with the same values")
    if found.conflicts:
        listed = "\n  ".join(found.conflicts)
        raise FailedCells(f"{len(found.conflicts)} values contradict ours, which are kept:\n  {listed}")


def compare(
    a: Annotated[Path, typer.Argument(help="A results folder, such as results/baselines.")],
    b: Annotated[Path, typer.Argument(help="Another one, of the same suite.")],
    everything: Annotated[bool, typer.Option("--all", help="Show rows that did not change, too.")] = False,
) -> None:
    """Show what changed from results folder A to B, with 95 % intervals of the differences.

    Rows are of the same number where model, weights, dtype, method, target, seed, tokens, metric, text, window and
    count are the same. The exit code is 0 whatever changed, and 2 where the folders have no row in common.
    """
    from resting.benchmarks.checks import compare as comparison

    print(comparison.text(comparison.compare(a, b), everything))
    left, right = comparison.only_in(a, b)
    if left or right:
        print(f"\n{left} rows are only in {a}, {right} only in {b}.")
        print("\n".join(comparison.only_in_words(a, b)))


def across(
    folder: Annotated[list[Path], typer.Argument(help="Results folders of one protocol, such as results/scale-*.")],
    into: Annotated[Path, typer.Option(help="Folder to write README.md, pictures and tables into.")],
) -> None:
    """Set results folders side by side: loss against the size of models, or against the length of contexts.

    They differ in their models, or in the length of windows, and in nothing else that a loss depends on.
    """
    from resting.benchmarks.cli import show
    from resting.benchmarks.report.across.write import write
    from resting.benchmarks.sweep.output import check_writable

    check_writable(into)
    show.folder(write(folder, into))


def verify(
    suite: Annotated[
        str, typer.Argument(help="Name of a suite whose results are in --output.", autocompletion=complete.suites)
    ],
    sample: Annotated[int, typer.Option(min=1, help="Cells to measure again.")] = 5,
    seed: Annotated[int, typer.Option(help="Seed of the choice.")] = 0,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Relative difference that rounding may make.")] = 0.01,
    model: Annotated[str | None, typer.Option(help="Where the suite's model is, if it is not at hand.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE: the file of a text that the suite names.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    output: Output = Path("results"),
) -> None:
    """Measure random rows of the committed results of SUITE again, and compare."""
    from resting.benchmarks.cells.options import Options
    from resting.benchmarks.checks import verify as again
    from resting.benchmarks.errors import FailedCells
    from resting.benchmarks.progress import Console

    check_device(device)
    options = Options(output, model, device, None, pairs(text or []))
    found = again.verify(output / suite, options, sample, seed, tolerance, Console())
    print("\n".join(map(str, found)))
    differ = sum(not one.agrees for one in found)
    if differ or not found:
        lost = sum(bool(one.reason) for one in found)
        more = f", {lost} of them have no number now" if lost else ""
        raise FailedCells(f"{differ} of {len(found)} numbers differ by more than {tolerance:g}{more}")


def guard(
    reference: Annotated[Path, typer.Option(help="File of committed figures.")] = Path("results/guard/reference.json"),
    update: Annotated[bool, typer.Option("--update", help="Write this machine's figures as the reference.")] = False,
    micro: Annotated[
        Path | None, typer.Option(help="JSON of a run of `tox -e micro`, to read the ratios of times from.")
    ] = None,
) -> None:
    """Measure a small fixed suite, and fail where a figure is not the committed one."""
    from resting.benchmarks.checks.guard import check
    from resting.benchmarks.checks.guard.run import measured, write
    from resting.benchmarks.errors import FailedCells

    known = {} if update else check.load(reference)
    found = measured(micro)
    if update:
        write(reference, found)
        print(f"wrote {reference}")
        return
    lines = check.findings(found, known)
    print("\n".join(map(str, lines)))
    if lost := [one.name for one in lines if not one.holds]:
        raise FailedCells(f"{len(lost)} of {len(lines)} figures are not those of {reference}: {', '.join(lost)}")


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    for command in (merge, compare, across, verify, guard):
        app.command()(command)
