"""Refuses text that is longer than a model's positions, or has tokens that it has no embedding of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.errors import ModelError, first_line

STRETCHED = ("linear", "dynamic", "yarn")
"""Scalings with which a configuration may still give the positions that the model had before."""


def positions(config: Any) -> int | None:
    """Return how many positions a model has; None where it sets no limit.

    Parameters
    ----------
    config : transformers.PretrainedConfig
    """
    text = config.get_text_config()
    found = getattr(text, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    if rope.get("rope_type") in STRETCHED:
        original = rope.get("original_max_position_embeddings") or found
        found = max(found, int(original * (rope.get("factor") or 1)))
    return found


def check_windows(source: ModelSource, lengths: Mapping[str, int]) -> None:
    """Refuse windows that are longer than the model of `source` has positions for.

    Parameters
    ----------
    source : ModelSource
    lengths : dict
        Tokens, by the setting that asks for them.

    Raises
    ------
    ModelError
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=source.trusted)
    except Exception as error:
        raise ModelError(f"the model in {source.folder} cannot be loaded: {first_line(error)}") from error
    limit = positions(config)
    for setting, length in lengths.items():
        if limit is not None and length > limit:
            raise ModelError(f"{setting} = {length}: {source.name} has {limit} positions; allowed: up to {limit}")


def check_ids(ids: Iterable[int], model: Any, tokenizer: Any, text: str) -> None:
    """Refuse tokens that `model` has no embedding of.

    Parameters
    ----------
    ids : iterable of int
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizerBase
    text : str
        What was split, as the message names it.

    Raises
    ------
    ModelError
        Names the largest such token.
    """
    rows = len(model.get_input_embeddings().weight)
    largest = max(ids, default=0)
    if largest >= rows:
        raise ModelError(
            f"{text} has the token {tokenizer.convert_ids_to_tokens(largest)!r} with the number {largest}; "
            f"its model has embeddings of numbers below {rows}"
        )
