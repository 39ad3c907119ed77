"""Defines the command that sends results in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from resting.benchmarks.cli.options import Output, check_device, pairs
from resting.benchmarks.errors import BenchmarkError


def submit(
    folder: Annotated[Path, typer.Argument(help="A results folder of yours, as `resting run` wrote it.")],
    name: Annotated[str | None, typer.Option(help="Of the folder in results/community: my-group.")] = None,
    by: Annotated[str | None, typer.Option(help="Who measured it; it stands on the page.")] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Measure a sample again.")] = True,
    sample: Annotated[int, typer.Option(min=1, help="Cells to measure again.")] = 2,
    tolerance: Annotated[float, typer.Option(min=0.0, help="Relative difference that rounding may make.")] = 0.01,
    model: Annotated[str | None, typer.Option(help="Where the suite's model is, if it is not at hand.")] = None,
    text: Annotated[list[str] | None, typer.Option(help="NAME=FILE, for instance wikitext2=FILE.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    check: Annotated[bool, typer.Option("--check", help="Check a folder of results/community; write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what was sent in before.")] = False,
    output: Output = Path("results"),
) -> None:
    """Check results of yours, measure a sample again, and write what a pull request needs into results/community/NAME.

    Example: resting submit mine/baselines --name my-group --by "Ada Lovelace"
    """
    from resting.benchmarks.submit import check as checking
    from resting.benchmarks.submit import write as writing

    check_device(device)
    if check:
        facts = writing.read(folder)
        print(f"{folder}: {facts['suite']}, measured by {facts['by']}; {facts['verified']}")
        return
    if name is None or by is None:
        raise BenchmarkError("results are sent in under a name: give --name NAME and --by WHO")
    writing.check_name(name, by)
    checked = checking.check(folder)
    home = writing.check_home(output, checked, name, overwrite)
    said, numbers = "not measured again: --no-verify was given", list[dict[str, Any]]()
    if checked.times:
        said = "times, which another machine cannot measure again"
    elif verify:
        said, numbers = _again(folder, sample, tolerance, model, pairs(text or []), device)
    writing.write(folder, home, checked, by, said, numbers)
    print(f"checked: {', '.join(checked.said)}\n{said}")
    for file in sorted(home.iterdir()):
        print(f"wrote {file}")
    print(f"\nOpen a pull request with {home.parent}. A job measures a sample of it again.")


def _again(
    folder: Path, sample: int, tolerance: float, model: str | None, texts: dict[str, str], device: str
) -> tuple[str, list[dict[str, Any]]]:
    """Measure a sample again where the model is at hand; what that gave, in words and number by number."""
    from resting.benchmarks.assets import models
    from resting.benchmarks.cells.options import Options, one_model
    from resting.benchmarks.cells.suite import Suite
    from resting.benchmarks.checks import verify
    from resting.benchmarks.progress import Console
    from resting.benchmarks.report.folder import read_facts

    console = Console()
    spec = one_model(Suite.model_validate(read_facts(folder)["suite"]), model)
    try:
        models.resolve(spec, console.say, console.stage)
    except BenchmarkError as error:
        if model is not None:
            raise
        return f"not measured again: the model is not at hand ({error})", []
    finally:
        console.end()
    found = verify.verify(folder, Options(folder.parent, model, device, None, texts), sample, 0, tolerance, console)
    differ = [one for one in found if not one.agrees]
    if differ or not found:
        first = ""
        if differ:
            now = f"there is none ({differ[0].reason})" if differ[0].reason else f"{differ[0].measured:g}"
            first = f", the first being {differ[0].name}: {differ[0].committed:g}, now {now}"
        raise BenchmarkError(
            f"{len(differ)} of {len(found)} numbers differ by more than {tolerance:g} when they are measured again"
            f"{first}; allowed: at least one number, and all that agree"
        )
    numbers = [{"name": one.name, "committed": one.committed, "measured": one.measured} for one in found]
    return f"{len(found)} numbers of {sample} cells measured again, all within {100 * tolerance:g} %", numbers


def register(app: typer.Typer) -> None:
    """Add this command to `app`."""
    app.command()(submit)
