"""Checks that a model's folder is whole, as it was written, and without code of its own, before it is used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from resting.benchmarks.assets import wheels
from resting.benchmarks.errors import ModelError, first_line
from resting.sparsifier import Decoder, UnsupportedModelError

SEAL = "resting.json"
"""In a folder that this project made: what the model is called, and the sha256 of every other file."""
SAMPLE = "The quick brown fox jumps over the lazy dog, 0123456789 times; \u00fcber \u4e2d\u6587 \u0416."


def seal(folder: Path, facts: dict[str, str]) -> None:
    """Note `facts` and the hashes of all files, so that a change is seen (`is_sealed`)."""
    hashes = {file.name: wheels.sha256_of(file) for file in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(facts | {"files": hashes}))


def is_sealed(folder: Path) -> bool:
    """Whether `folder` holds the files that were there when it was sealed, and no other."""
    try:
        hashes = json.loads((folder / SEAL).read_text())["files"]
        names = {file.name for file in folder.iterdir()} - {SEAL}
        return names == set(hashes) and all(wheels.is_intact(folder / name, hashes[name]) for name in names)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises
    ------
    ModelError
        If the file cannot be read, or holds anything else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"{file} holds a {type(found).__name__}; allowed: a JSON object")
    return found


def check(folder: Path, trusted: bool) -> None:
    """Refuse a folder whose configuration is of no known model, or that brings code while that is not `trusted`.

    Raises
    ------
    ModelError
    """
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if not file.exists() and name != "config.json":
            continue
        if "auto_map" in read_json(file) and not trusted:
            raise ModelError(
                f"{folder} brings code of its own ({name} has auto_map), which is never run unless "
                "--trust-remote-code is given"
            )
    from transformers import AutoConfig

    try:
        AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} describes no known model: {first_line(error)}") from error


def check_model(model: Any, folder: Path, missing: list[str]) -> None:
    """Refuse a model whose weights are not all there, or not all numbers, or that is no decoder of the known form.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    folder : Path
    missing : list of str
        Weights that the folder lacks; transformers makes random ones in their place.

    Raises
    ------
    ModelError
    """
    try:
        Decoder.of(model)
    except UnsupportedModelError as error:
        raise ModelError(f"{folder} is no model that inputs can rest in: {error}") from error
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ModelError(f"{folder} lacks the weights {missing[0]}{more}; allowed: all that its config.json asks for")
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{folder} has NaN or infinite weights in {name}; allowed: finite numbers")


def check_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Refuse a tokenizer that splits no text, or gives tokens that the model has no embedding of.

    Raises
    ------
    ModelError
    """
    ids = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    config = read_json(folder / "config.json")
    size = (config.get("text_config") or config).get("vocab_size")
    if not ids:
        raise ModelError(f"{folder} has no tokenizer that splits text into tokens")
    if isinstance(size, int) and max(ids) >= size:
        raise ModelError(f"{folder} has a tokenizer that gives token {max(ids)}; its model knows tokens below {size}")
