"""Opens a plan and the model that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resting.benchmarks.assets import model_checks, models
from resting.benchmarks.assets.gguf import Say
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.errors import AssetError, BenchmarkError
from resting.sparsifier import OnProgress, Plan, PlanError, silent

MASKS = "masks"
"""Where an exported model keeps its plan (`Plan.export`)."""


@dataclass(frozen=True)
class Opened:
    """Holds a plan with its model, which was checked to be the one that it was fitted on.

    Attributes
    ----------
    plan : Plan
    source : ModelSource
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizer
    """

    plan: Plan
    source: ModelSource
    model: Any
    tokenizer: Any


def read_plan(folder: Path, option: str = "--plan") -> Plan:
    """Read the plan in `folder`.

    Raises
    ------
    BenchmarkError
        If there is none.
    PlanError
        If it is damaged, or of a newer format.
    """
    if not (folder / "plan.json").exists():
        if not folder.exists():
            raise BenchmarkError(f"{option} {folder}: there is no such folder")
        inside = f"; that of an exported model is {folder / MASKS}" if (folder / MASKS / "plan.json").exists() else ""
        raise BenchmarkError(f"{option} {folder}: there is no plan in it, which has a file plan.json{inside}")
    return Plan.load(folder)


def model_of(plan: Plan, folder: Path, option: str = "--model") -> str:
    """Find out which model a plan belongs to: the folder it was exported with, or what the plan says of its fit.

    Raises
    ------
    BenchmarkError
        If nothing says it.
    """
    folder = folder.resolve()
    if folder.name == MASKS and (folder.parent / "config.json").is_file():
        return str(folder.parent)
    fitted = plan.info.get("fitted")
    fitted = fitted if isinstance(fitted, Mapping) else {}
    for name in ("source", "model"):
        if isinstance(named := fitted.get(name), str) and named.strip():
            return named
    raise BenchmarkError(
        f"the plan in {folder} does not say which model it was fitted on; {option} names it: a folder, a .gguf file, "
        f"a hub id, or {models.DEFAULT}"
    )


def open_plan(
    folder: Path,
    spec: str | None,
    dtype: str | None,
    device: str = "cpu",
    trusted: bool = False,
    say: Say = lambda text: None,
    on_progress: OnProgress = silent,
    options: tuple[str, str] = ("--plan", "--model"),
) -> Opened:
    """Read a plan and load its model.

    Parameters
    ----------
    folder : Path
        Of the plan.
    spec : str, optional
        The model, as `models.resolve` takes it; the one that the plan names where None.
    dtype : str, optional
        The one that the model's configuration names where None.
    device : str
    trusted : bool
        Run the code that the model's folder brings.
    say, on_progress : callable
        Are told of what is fetched.
    options : (str, str)
        What messages call the plan and the model.

    Raises
    ------
    BenchmarkError
        If the plan or its model cannot be had, or do not belong together.
    """
    plan = read_plan(folder, options[0])
    named = spec if spec is not None else model_of(plan, folder, options[1])
    try:
        source = models.resolve(named, say, on_progress, trusted=trusted)
    except AssetError as error:
        if spec is not None:
            raise
        raise AssetError(f"{error} (so the plan names its model; {options[1]} says where else it is)") from error
    on_progress("load", 0, 1, source.name)
    model = source.load(getattr(torch, dtype or stored_dtype(source)), device)
    try:
        plan.check(model)
    except PlanError as error:
        raise BenchmarkError(f"{options[0]} {folder} and {options[1]} {named} do not go together: {error}") from error
    tokenizer = source.tokenizer()
    on_progress("load", 1, 1, source.name)
    return Opened(plan, source, model, tokenizer)


def stored_dtype(source: ModelSource) -> str:
    """Return the dtype that a model's configuration says its weights have; float32 where it says none."""
    config = model_checks.read_json(source.folder / "config.json")
    places = (config, config.get("text_config") or {})
    found = next((place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key)), "float32")
    return found if isinstance(getattr(torch, str(found), None), torch.dtype) else "float32"
