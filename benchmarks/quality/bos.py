"""Says which tokens a window of text and a prompt begin with."""

from __future__ import annotations

from typing import Any

from resting.benchmarks.assets.model_checks import read_json
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells.suite import Bos
from resting.benchmarks.errors import SuiteError

NEED_BOS = frozenset(
    {
        *("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        *("paligemma", "recurrent_gemma", "vaultgemma"),
    }
)
"""Kinds of models, by `model_type`, that saw a BOS token before every text in training and are far worse without."""


def beginning(tokenizer: Any, bos: Bos) -> list[int]:
    """Return the ids of the tokens that come before the text of every window and prompt.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizer
    bos : {"auto", "always", "never"}
        What the tokenizer itself puts before a text, its BOS token, or nothing.

    Raises
    ------
    SuiteError
        If the tokenizer has no BOS token, and one is asked for.
    """
    if bos == "never":
        return []
    if bos == "always":
        if tokenizer.bos_token_id is None:
            raise SuiteError('bos = "always": the tokenizer has no BOS token; allowed: "auto" and "never"')
        return [tokenizer.bos_token_id]
    bare, given = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    found = (n for n in range(len(given)) if given[n : n + len(bare)] == bare)
    return list(given[: next(found, 0)])


def shown(tokenizer: Any, bos: Bos) -> list[str]:
    """Return `beginning` as tokens that a person can read."""
    return [str(token) for token in tokenizer.convert_ids_to_tokens(beginning(tokenizer, bos))]


def check(source: ModelSource, bos: Bos) -> str | None:
    """Refuse a BOS token that the tokenizer of `source` does not have, and look for one that the model needs.

    Returns
    -------
    str or None
        A warning, where the model is of a kind that needs a BOS token and would be measured without.

    Raises
    ------
    SuiteError
        If the tokenizer has no BOS token, and one is asked for.
    """
    kind = read_json(source.folder / "config.json").get("model_type")
    if bos != "always" and kind not in NEED_BOS:
        return None
    tokenizer = source.tokenizer()
    if tokenizer.bos_token_id in beginning(tokenizer, bos) or kind not in NEED_BOS:
        return None
    why = "its tokenizer adds none" if bos == "auto" else 'bos = "never"'
    return (
        f"warning: models of the kind {kind} need a BOS token before every text, and {source.name} is measured without "
        f'one ({why}); `bos = "always"` in the suite gives it one'
    )
