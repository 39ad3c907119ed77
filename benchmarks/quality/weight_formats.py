"""Describes models in weight formats: each is a model of its own, with its own statistics and plans."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from resting.benchmarks.assets import model_checks, quantised
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.errors import ModelError
from resting.benchmarks.names import with_format
from resting.sparsifier import Decoder, SparsifierError, UnsupportedModelError
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import check


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
                check(model, Decoder.of(model), format)
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
