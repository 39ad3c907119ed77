"""Writes the README of a plan: a model card with method, target, measured figures and how it is used."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resting.sparsifier.neurons.mask import NeuronMask
from resting.sparsifier.roles import ACT
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site

LIBRARY = "resting-neurons"
TAGS = ("activation-sparsity", LIBRARY)
NAMED = {"matched": "share of weight bytes left unread, measured on calibration text"}
"""What a figure that every fitted plan has is called; others keep the name that their method gave them."""
NOT_SHOWN = {"fitted: model", "fitted: source"}
"""What stands elsewhere in the card, without its path."""
PLACES = ("source", "model")
"""Fields of `info["fitted"]` that may name a folder of the machine that a plan was fitted on."""
LONGEST = 200
"""Characters of a figure; what is longer, such as a training curve, stays in plan.json."""

ABOUT = """\
This is a plan of activation (input) sparsity: which inputs of a language model's linear layers may rest, token by
token, so that their columns of the weights are not read. It holds no weights of the model itself, and is refused by
any other model than the one it was fitted on."""
USE = """\
from resting import Plan, decoding

plan = Plan.from_hub("{repo_id}")
with decoding(plan, model):  # a transformers model
    model.generate(ids, max_new_tokens=20)
"""


def write(
    meta: Mapping[str, Any],
    rules: Mapping[Site, Rule],
    title: str,
    about: str,
    use: str,
    library: str = LIBRARY,
    neurons: Mapping[Site, NeuronMask] | None = None,
) -> str:
    """Makes the text of README.md, with the metadata that the Hugging Face hub reads.

    Parameters
    ----------
    meta : mapping
        Fields of the plan but for its rules: method, target, nominal, model, calibration, info.
    rules : mapping of Site to Rule
    title, about, use : str
        The heading, what lies in the folder, and Python that uses it.
    library : str
        Which library loads the folder.
    neurons : mapping of Site to NeuronMask, optional
    """
    header = [f"library_name: {library}", "tags:", *(f"- {tag}" for tag in TAGS)]
    base = base_model(meta["info"])
    if base and "/" in base:  # the hub takes ids only
        header.append(f"base_model: {json.dumps(base)}")
    facts = {
        "method": f"`{meta['method']}`",
        "target, the share of weight bytes that a decode step leaves unread": f"{meta['target']:g}",
        "nominal, what the dense model's statistics promise of it": f"{meta['nominal']:.4g}",
        "fitted on the model": f"`{base or 'unknown'}`, weights `{meta['model'][:16]}`",
        "calibration text": f"`{meta['calibration'][:16] or 'unknown'}`",
    } | counts(rules, neurons)
    if "transform" in meta:
        facts["the model is rewritten first, exactly"] = f"`{meta['transform']['name']}`"
    figures = {NAMED.get(name, name): value for name, value in _figures(meta["info"])}
    return "\n".join(
        [
            *("---", *header, "---", "", f"# {_inline(title)}", "", about, ""),
            *_table("what", facts),
            *("", "## Measured", ""),
            *(_table("figure", figures) if figures else ["This plan keeps no measured figures."]),
            *("", "## Use", "", "```python", use.strip(), "```", ""),
        ]
    )


def base_model(info: Mapping[str, Any]) -> str | None:
    """Gives the model that the plan says it was fitted on: its hub id, or the name of its folder without the path.

    None where the plan does not say it.
    """
    fitted = info.get("fitted")
    fitted = fitted if isinstance(fitted, Mapping) else {}
    names = [n for n in (fitted.get("source"), fitted.get("model")) if isinstance(n, str) and n.strip()]
    hub_id = next((name for name in names if is_hub_id(name)), None)
    return hub_id or (Path(names[-1]).name if names else None)


def is_hub_id(name: str) -> bool:
    """Tells whether `name` is the id of a repository, and no path of this machine."""
    is_id = re.fullmatch(r"[\w.-]+/[\w.-]+", name, re.ASCII) and not Path(name).exists() and name[0] != "."
    return bool(is_id)


def public(info: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves out where on this machine the model lies that a plan was fitted on."""
    found, fitted = dict(info), info.get("fitted")
    if isinstance(fitted, Mapping):
        private = [n for n in PLACES if isinstance(fitted.get(n), str) and is_place(fitted[n])]
        found["fitted"] = {name: value for name, value in fitted.items() if name not in private}
    return found


def is_place(name: str) -> bool:
    """Tells whether `name` is a path with folders in it."""
    return len(Path(name).parts) > 1 and not is_hub_id(name)


def counts(rules: Mapping[Site, Rule], neurons: Mapping[Site, NeuronMask] | None = None) -> dict[str, str]:
    """Counts what a plan holds: the parts of its rules, and neuron masks by their scores."""
    scores = Counter(mask.score for mask in (neurons or {}).values())
    found = {
        "masks": sum(not rule.masks_nothing for rule in rules.values()),
        "of them at the activated gate": sum(s.role == ACT and not rule.masks_nothing for s, rule in rules.items()),
        "biases": sum(rule.bias is not None for rule in rules.values()),
        "shifts": sum(rule.shifts for rule in rules.values()),
        "rescaled inputs": sum(rule.rescale for rule in rules.values()),
        "replaced weights": sum(rule.weight is not None for rule in rules.values()),
        "low-rank parts": sum(rule.low_rank is not None for rule in rules.values()),
    } | {f"neuron masks by {score}": number for score, number in scores.items()}
    return {name: str(number) for name, number in found.items() if number or name in ("masks", "biases")}


def _figures(info: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    """Lists the numbers and words of `info`, those inside of others with both names."""
    for name, value in info.items():
        full = f"{before}{name}"
        if isinstance(value, Mapping):
            if not before and all(isinstance(key, str) and not re.match(r"\d+\.", key) for key in value):
                yield from _figures(value, f"{full}: ")
        elif isinstance(value, float):
            yield full, f"{value:.4g}"
        elif isinstance(value, bool | int | str) and full not in NOT_SHOWN and len(str(value)) <= LONGEST:
            yield full, str(value)


def _table(first: str, values: Mapping[str, str]) -> list[str]:
    rows = [f"| {_cell(name)} | {_cell(value)} |" for name, value in values.items()]
    return [f"| {first} | |", "|---|---|", *rows]


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """Puts `text` into one line, in which no HTML begins."""
    return " ".join(text.split()).replace("<", "&lt;")
