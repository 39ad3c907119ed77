"""Estimates how many tokens a text has, before a tokenizer has read it."""

from __future__ import annotations

from functools import cache as memoise

from resting.benchmarks.assets import texts
from resting.benchmarks.assets.texts import Own
from resting.benchmarks.cells.suite import Suite

WHOLE = {
    "wikitext2": 300_000,
    "wikipedia": 190_000,
    "papers": 750_000,
    "stories": 90_000,
    "mixed": 1_030_000,
    "code": 900_000,
}
"""Tokens of the evaluation documents, more or less, whichever tokenizer."""
CHARACTERS = 4
"""Characters of a token, more or less."""


def tokens(suite: Suite, text: str) -> int:
    """Estimate the tokens of a text's evaluation documents; those of one of the user's own by its characters."""
    if text not in suite.sources:
        return WHOLE[text]
    if suite.sources[text].sha256 is None:  # beside a data set of the hub nothing is read yet
        return max(WHOLE.values())
    return _of_own(text, suite.own(text))


@memoise
def _of_own(text: str, own: Own | None) -> int:
    """Those of a text that its hash names: cells share it, and it may be large."""
    return sum(map(len, texts.documents(text, "evaluation", own))) // CHARACTERS
