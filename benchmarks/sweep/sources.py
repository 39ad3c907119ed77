"""Lists the models of a run: told apart by name, and in every weight format."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from resting.benchmarks.assets import model_checks, quantised
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.errors import ModelError, SuiteError
from resting.benchmarks.names import of_weights, with_format, with_weights
from resting.sparsifier import Decoder, SparsifierError, UnsupportedModelError
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import check


def told_apart(sources: Sequence[ModelSource]) -> list[ModelSource]:
    """Give every model of a run a name of its own: that of its parent folder before it, else its hash behind it.

    Raises
    ------
    SuiteError
        If two of them are the same weights under the same name.
    """
    for (name, weights), times in Counter((one.name, one.sha256) for one in sources).items():
        if times > 1:
            raise SuiteError(f"the model {name} (sha256 {of_weights(weights)}) is named {times} times; allowed: once")
    count = Counter(one.name for one in sources)
    by_folder = [_with_parent(one) if count[one.name] > 1 else one for one in sources]
    alike = Counter(one.name for one in by_folder)
    return [
        replace(one, name=with_weights(one.name, of_weights(one.sha256))) if alike[longer.name] > 1 else longer
        for one, longer in zip(sources, by_folder)
    ]


def in_formats(sources: Sequence[ModelSource], formats: Sequence[str]) -> list[ModelSource]:
    """Give every model in every weight format; each is then a model of its own, with its own statistics and plans.

    Raises
    ------
    ModelError
        If a group does not divide the outputs of a model's matrices, or a checkpoint is quantised already.
    """
    found = [stored_as(one, name) for one in sources for name in formats]
    for source in found:
        if (format := Format.parse(source.weights)) is not None and (model := _without_weights(source)) is not None:
            try:
                check(Decoder.of(model), format)
            except UnsupportedModelError:  # what it is, loading says
                continue
            except SparsifierError as error:
                raise ModelError(f"--weights {source.weights}: {error}") from error
    return found


def stored_as(source: ModelSource, weights: str) -> ModelSource:
    """Describe a model with its block linears stored in a format, under a name and a hash of its own.

    Raises
    ------
    ModelError
        If the checkpoint is quantised already.
    """
    if Format.parse(weights) is None:
        return source
    if kind := quantised.kind_of(model_checks.read_json(source.folder / "config.json"), source.folder):
        raise ModelError(
            f"--weights {weights}: {source.folder} is a quantised checkpoint ({kind}); allowed: plain weights"
        )
    digest = hashlib.sha256(f"{source.sha256} {weights}".encode()).hexdigest()
    return replace(source, name=with_format(source.name, weights), sha256=digest, weights=weights)


def _without_weights(source: ModelSource) -> Any | None:
    """Build a model with shapes and no numbers; None where that cannot be done, which loading explains."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=source.trusted)
    except Exception:
        return None


def _with_parent(source: ModelSource) -> ModelSource:
    """The model under its own folder's name and the one above; as it is where it is not named after its folder."""
    folder = source.folder.resolve()
    named = folder.name == source.name
    return replace(source, name=f"{folder.parent.name}/{source.name}") if named else source
