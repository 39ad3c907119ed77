"""Defines the commands that use a fitted plan: generating text, exporting a model, asking lm-eval's tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from resting.benchmarks.cli.options import Dtype, TrustRemoteCode, check_device, check_model
from resting.benchmarks.errors import BenchmarkError

PlanFolder = Annotated[Path, typer.Option("--plan", help="Folder of a plan.")]
Model = Annotated[
    str | None,
    typer.Option(help="Local folder, .gguf file, or hub id; by default the model that the plan was fitted on."),
]


def generate(
    plan: PlanFolder,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    model: Model = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Let the dense model write as well; show speed and bytes of both.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write, at most.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="Temperature of sampling; 0 takes the likeliest token every time.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[Dtype | None, typer.Option(help="float32 on a CPU and bfloat16 on a GPU by default.")] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the CPU; torch's own number by default.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write text with a model under a plan, through the kernels that do not read what rests.

    Example: resting generate --plan plan/ --prompt "The capital of France is" --compare
    """
    import torch

    from resting.benchmarks.progress import Console
    from resting.benchmarks.using import comparing, generating, opening
    from resting.sparsifier.decoding import decoding

    check_device(device)
    check_model(model)
    if threads is not None:
        torch.set_num_threads(threads)
    kind = dtype.value if dtype is not None else "float32" if device == "cpu" else "bfloat16"
    console = Console()
    try:
        opened = opening.open_plan(plan, model, kind, device, trust_remote_code, console.say, console.stage)
    finally:
        console.end()
    ids = generating.encode(opened.model, opened.tokenizer, prompt, chat, max_new_tokens)
    setting = generating.Setting(max_new_tokens, temperature, seed)
    under = f"{opened.plan.method} at {opened.plan.target:g}"
    if compare:
        print(f"dense ({opened.source.name}):", flush=True)
        dense = generating.write(opened.model, opened.tokenizer, ids, setting)
        print(f"\nsparse ({under}):", flush=True)
    console.stage("lay out", 0, 1, "weights for the kernels")
    try:
        with decoding(opened.plan, opened.model, threads=threads):
            console.end()
            sparse = generating.write(opened.model, opened.tokenizer, ids, setting)
    finally:
        console.end()
    if compare:
        console.stage("measure", 0, 1, "bytes of decoded tokens")
        try:
            read = comparing.measured(opened.model, opened.plan, sparse)
        finally:
            console.end()
        print("\n" + "\n".join(comparing.lines(dense, sparse, read)))
        return
    seconds = sparse.per_token
    speed = "" if seconds is None else f", {1 / seconds:.1f} a second"
    console.say(f"{sparse.new} tokens{speed}: {opened.source.name} under {under}, {kind} on {device}")


def export(
    plan: PlanFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write; a new one.")],
    model: Model = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights; that of the model by default.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an exported model in that folder.")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write a folder that transformers loads alone: the model with a plan's biases, its tokenizer, a README, the masks.

    Example: resting export --plan plan/ -o folder/
    """
    from resting.benchmarks.progress import Console
    from resting.benchmarks.using import exporting, opening

    check_model(model)
    exporting.check_output(output, overwrite)
    console = Console()
    try:
        kind = None if dtype is None else dtype.value
        opened = opening.open_plan(plan, model, kind, "cpu", trust_remote_code, console.say, console.stage)
        console.stage("write", 0, 1, str(output))
        exporting.export(opened, output)
    finally:
        console.end()
    for file in sorted(output.rglob("*")):
        if file.is_file():
            print(f"wrote {file}")
    print(f"Not in its weights: {'; '.join(exporting.left_out(opened.plan))}.")


def lm_eval(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="ARGUMENTS...", help="Of lm-eval's own command line.")
    ] = None,
) -> None:
    """Run lm-eval's command line, which then knows a model under a plan: --model resting.

    Example: resting lm-eval --model resting --model_args plan=plan/,tokens=all-but-first:1 --tasks piqa

    Further model_args are pretrained (by default the model that the plan was fitted on), dtype, device, max_length and
    trust_remote_code. `resting lm-eval run --help` shows lm-eval's own options.
    """
    from resting.benchmarks.using import lm_eval_command

    if not arguments:
        raise BenchmarkError("lm-eval needs arguments: resting lm-eval --model resting --model_args plan=FOLDER ...")
    lm_eval_command.run(arguments)


def register(app: typer.Typer) -> None:
    """Add these commands to `app`."""
    app.command()(generate)
    app.command()(export)
    handed_on = {"ignore_unknown_options": True, "allow_interspersed_args": False}
    app.command(name="lm-eval", context_settings=handed_on)(lm_eval)
