"""Checks that a model's folder is whole, as it was written, and without code of its own, before it is used."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch

from resting.benchmarks.assets import config_keys, wheels
from resting.benchmarks.errors import ModelError, first_line
from resting.sparsifier import Decoder, UnsupportedModelError

SEAL = "resting.json"
"""In a folder that this project made: what the model is called, and the sha256 of every other file."""
CONVERSION = 3
"""Goes up where a conversion or its checks change: folders that were sealed under another number are made again."""
SAMPLE = "The quick brown fox jumps over the lazy dog, 0123456789 times; \u00fcber \u4e2d\u6587 \u0416."


def seal(folder: Path, facts: dict[str, str]) -> None:
    """Note `facts` and the hashes of all files, so that a change is seen (`is_sealed`)."""
    hashes = {file.name: wheels.sha256_of(file) for file in sorted(folder.iterdir())}
    (folder / SEAL).write_text(json.dumps(facts | {"conversion": CONVERSION, "files": hashes}))


def is_sealed(folder: Path) -> bool:
    """Whether `folder` holds the files that were there when it was sealed by this code, and no other."""
    try:
        about = json.loads((folder / SEAL).read_text())
        hashes = about["files"]
        names = {file.name for file in folder.iterdir()} - {SEAL}
        known = about["conversion"] == CONVERSION and names == set(hashes)
        return known and all(wheels.is_intact(folder / name, hashes[name]) for name in names)
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
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
    except Exception as error:
        raise ModelError(f"{folder / 'config.json'} describes no known model: {first_line(error)}") from error
    config_keys.check(read_json(folder / "config.json"), config, folder)


def check_loading(model: Any, about: dict[str, Any], what: str) -> None:
    """Refuse a model that did not take every weight there is, each in its shape, or whose weights are not all there.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    about : dict
        What transformers says of the loading; it makes random weights in the place of those that are missing.
    what : str
        The file or folder, as the message names it.

    Raises
    ------
    ModelError
    """
    for key, said, allowed in (
        ("missing_keys", "lacks", "all that its config.json asks for"),
        ("unexpected_keys", "has", "those that its model takes"),
        ("mismatched_keys", "has another shape of", "the shapes that its config.json asks for"),
    ):
        found = sorted(name if isinstance(name, str) else name[0] for name in about.get(key) or ())
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            raise ModelError(f"{what} {said} the weights {found[0]}{more}; allowed: {allowed}")
    if about.get("error_msgs"):
        raise ModelError(f"{what} cannot be loaded: {' '.join(str(about['error_msgs'][0]).split())}")
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and outer is not None and not torch.equal(inner.weight, outer.weight):
        raise ModelError(
            f"{what} has an output matrix of its own, and its config.json says that it is the embedding; "
            "allowed: tie_word_embeddings = false with it"
        )


def check_model(model: Any, about: dict[str, Any], folder: Path) -> None:
    """Refuse a model that is no decoder of the known form, is not what its folder holds, or is not all numbers.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    about : dict
        What transformers says of the loading.
    folder : Path

    Raises
    ------
    ModelError
    """
    try:
        Decoder.of(model)
    except UnsupportedModelError as error:
        raise ModelError(f"{folder} is no model that inputs can rest in: {error}") from error
    check_loading(model, about, str(folder))
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise ModelError(f"{folder} has NaN or infinite weights in {name}; allowed: finite numbers")


def lacking_package(folder: Path) -> str | None:
    """Return the package that is needed to read the folder's tokenizer, and that is not installed."""
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return None
    for package, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")):
        try:
            importlib.import_module(module)
        except ImportError:
            return package
    return None


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
