"""Writes a folder that plain transformers loads: a model with a plan's biases, and beside it what cannot be folded."""

from __future__ import annotations

from pathlib import Path

from resting.benchmarks.errors import BenchmarkError, first_line
from resting.benchmarks.using.opening import MASKS, Opened
from resting.sparsifier import Plan, SparsifierError, card
from resting.sparsifier.files import replacing_folder

USE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
from resting import Plan, decoding

folder = "."  # where this file is
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
with decoding(Plan.load(f"{folder}/masks"), model):  # without this line nothing rests
    print(tokenizer.decode(model.generate(ids, max_new_tokens=20)[0]))
"""


def check_output(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that is there already, unless it may be overwritten and was written by `export`.

    Raises
    ------
    BenchmarkError
    """
    if not folder.exists() and not folder.is_symlink():
        return
    if not folder.is_dir():
        raise BenchmarkError(f"--output {folder} is no folder; allowed: a new one")
    if not any(folder.iterdir()):
        return
    is_export = (folder / "config.json").is_file() and (folder / MASKS / "plan.json").is_file()
    if not is_export:
        raise BenchmarkError(f"--output {folder} holds something else than an exported model: it is not overwritten")
    if not overwrite:
        raise BenchmarkError(f"--output {folder} exists; allowed: a new folder, or --overwrite")


def export(opened: Opened, folder: Path) -> Plan:
    """Write model, tokenizer, README.md and ``masks/`` into `folder`, all or nothing.

    Returns
    -------
    Plan
        The masks, which belong to the model in `folder`.

    Raises
    ------
    SparsifierError
        If the plan cannot be folded into this model.
    BenchmarkError
        If transformers cannot save the model.
    """
    with replacing_folder(folder) as new:
        try:
            masks = opened.plan.export(opened.model, new)
            opened.tokenizer.save_pretrained(new)
        except SparsifierError:
            raise
        except (TypeError, ValueError, RuntimeError) as error:  # a generation config that may not be written, say
            raise BenchmarkError(
                f"{opened.source.name} cannot be saved by transformers: {first_line(error)}"
            ) from error
        (new / "README.md").write_text(readme(opened))
    return masks


def readme(opened: Opened) -> str:
    """Make the model card of an exported folder."""
    plan = opened.plan
    title = f"{opened.source.name} with the biases of {plan.method} at {plan.target:g}"
    licence = f"The licence is that of {opened.source.name}."
    about = "\n\n".join([_folded(opened), f"Not folded: {'; '.join(left_out(plan))}.", licence])
    return card.write(plan.meta(), plan.rules, title, about, USE, library="transformers", neurons=plan.neurons)


def left_out(plan: Plan) -> list[str]:
    """Say what of a plan stands in ``masks/`` and in no weight."""
    counted = card.counts(plan.rules, plan.neurons)
    found = [f"{counted['masks']} masks"]
    found += [f"{number} {name}" for name, number in counted.items() if name.startswith("neuron masks")]
    if "low-rank parts" in counted:
        found.append(f"{counted['low-rank parts']} low-rank parts, which stand in for what rests")
    return [*found, "shifts of inputs: there are none, a plan that has some cannot be exported"]


def _folded(opened: Opened) -> str:
    biases = int(card.counts(opened.plan.rules)["biases"])
    if biases:
        what = f"These are the weights of {opened.source.name}, with a fitted plan's biases in {biases} of its layers."
    else:
        what = f"These are the weights of {opened.source.name} as they were: the plan has no biases."
    return (
        f"{what} transformers loads them alone.\n\n**Without its masks this is the dense model"
        f"{' with biases' * bool(biases)}, and no faster:** no token leaves a weight unread, and a bias that was "
        f"fitted beside masks acts on every token. The plan with the masks is in `{MASKS}/`, for `decoding` and "
        "`Plan.applied` of resting-neurons, which make it sparse again."
    )
