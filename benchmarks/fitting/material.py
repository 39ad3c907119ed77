"""Cuts the documents of a text into the windows that a method is fitted on, and those that it is measured on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.cells.suite import Bos
from resting.benchmarks.errors import FitError
from resting.benchmarks.fitting.documents import Text
from resting.benchmarks.quality import limits
from resting.benchmarks.quality.bos import NEED_BOS, beginning
from resting.sparsifier import AllButFirst, Calibration, TokenPolicy

HELD_OUT = 0.1
"""Share of a text of the user's own that is held out."""


@dataclass(frozen=True)
class Sizes:
    """Says how much text is used, in windows.

    Attributes
    ----------
    windows : int or None
        To fit on; all that the text has where None. Methods that train go through as many as they need.
    window : int
        Tokens of each.
    statistics_windows : int
        The first so many give statistics (histograms, means).
    matching_windows : int
        The measured bytes are made to meet the target on so many.
    held_out_windows : int
        At most so many are measured on.
    """

    windows: int | None = None
    window: int = 512
    statistics_windows: int = 16
    matching_windows: int = 16
    held_out_windows: int = 16

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 8 if field.name == "window" else 1
            if value is None and field.name == "windows":
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise FitError(f"{field.name} = {value!r}: must be a whole number, at least {least}")


@dataclass(frozen=True)
class Material:
    """Holds what a method is fitted on and what it is measured on.

    Attributes
    ----------
    calibration : Calibration
    held_out : Tensor [n, window]
    text, held_out_text : str
        Their names.
    """

    calibration: Calibration
    held_out: Tensor
    text: str
    held_out_text: str


def of(
    text: Text,
    tokenizer: Any,
    sizes: Sizes = Sizes(),
    tokens: TokenPolicy = AllButFirst(1),
    bos: Bos = "auto",
) -> Material:
    """Cut `text` into windows, of which those to fit on and those held out share no document.

    Of a text without documents to measure on, whole documents from its end are held out: at least a tenth of it, and
    at least a window. Of a single document the last tokens are.

    Raises
    ------
    FitError
        If there is too little text; the message says how many tokens were found, and how many are needed.
    """
    if tokens.dense_tokens(sizes.window, 0) >= sizes.window - 1:
        raise FitError(
            f"tokens = {tokens}: leaves every token of a window of {sizes.window} dense; allowed are policies under "
            "which some token that predicts another is sparse (DecodeOnly takes a `prompt` here)"
        )
    begin = torch.tensor(beginning(tokenizer, bos)).long()
    body = sizes.window - len(begin)
    if text.held_out is None:
        fitted, kept = _divided(text, tokenizer, body, body * (sizes.windows or 1))
    else:
        fitted, kept = (_ids(documents, tokenizer) for documents in (text.documents, text.held_out))
        _check(text.name, len(fitted), body * (sizes.windows or 1), "to fit on")
        _check(text.held_out_name, len(kept), body, "to measure on")
    windows = _drawn(_cut(fitted, begin, body), sizes.windows, 0)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    calibration = Calibration(
        windows[order],  # the first ones, which give the statistics, are a sample of the whole text
        statistics_windows=sizes.statistics_windows,
        matching=_drawn(windows, sizes.matching_windows, 1),
        tokens=tokens,
    )
    held_out = _drawn(_cut(kept, begin, body), sizes.held_out_windows, 0)
    return Material(calibration, held_out, text.name, text.held_out_name)


def check(material: Material, model: Any, tokenizer: Any) -> None:
    """Refuse windows that are longer than `model` has positions for, or have tokens that it has no embedding of.

    Raises
    ------
    FitError, ModelError
    """
    length, limit = material.held_out.shape[1], limits.positions(model.config)
    if limit is not None and length > limit:
        raise FitError(f"window = {length}: the model has {limit} positions; allowed: up to {limit}")
    for name, ids in ((material.text, material.calibration.windows), (material.held_out_text, material.held_out)):
        limits.check_ids([int(ids.max())], model, tokenizer, name)


def lacks_bos(model: Any, tokenizer: Any, bos: Bos) -> str | None:
    """Return a warning where `model` is of a kind that needs a BOS token before a text, and gets none."""
    kind = getattr(model.config, "model_type", None)
    if kind not in NEED_BOS or tokenizer.bos_token_id in beginning(tokenizer, bos):
        return None
    return f"models of the kind {kind} need a BOS token before every text, and this one is fitted without one"


def _ids(documents: list[str], tokenizer: Any) -> Tensor:
    """Numbers of the tokens of all documents, one after the other."""
    text = "\n\n".join(documents)
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids).long()


def _check(name: str, found: int, needed: int, use: str) -> None:
    if found < needed:
        raise FitError(f"{name} has {found} tokens {use}, and {needed} are needed; allowed: more text, smaller windows")


def _divided(text: Text, tokenizer: Any, body: int, needed: int) -> tuple[Tensor, Tensor]:
    """Tokens to fit on, and tokens from the end of the text that are held out."""
    whole = _ids(text.documents, tokenizer)
    _check(text.name, len(whole), needed + body, "to fit on and to measure on")
    least = max(body, int(HELD_OUT * len(whole)))
    if len(text.documents) == 1:
        fitted, kept = whole[:-least], whole[-least:]
    else:
        first = _first_held_out(text.documents, tokenizer, least)
        fitted, kept = (_ids(part, tokenizer) for part in (text.documents[:first], text.documents[first:]))
        _check(f"the last of {len(text.documents)} documents of {text.name}", len(kept), body, "to measure on")
    _check(f"{text.name} without what is held out", len(fitted), needed, "to fit on")
    return fitted, kept


def _first_held_out(documents: list[str], tokenizer: Any, least: int) -> int:
    """Number of the first document of the shortest end that has `least` tokens; the first document is never in it."""
    tokens = 0
    for first in range(len(documents) - 1, 0, -1):
        tokens += len(_ids([documents[first]], tokenizer))
        if tokens >= least:
            return first
    return 1


def _cut(ids: Tensor, begin: Tensor, body: int) -> Tensor:
    cut = ids.unfold(0, body, body)
    return torch.cat([begin.expand(len(cut), -1), cut], 1)


def _drawn(windows: Tensor, count: int | None, seed: int) -> Tensor:
    """A seeded sample of the windows, in their order, as suites draw it (`windows_of`)."""
    if count is None or count >= len(windows):
        return windows
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
    return windows[order[:count].sort().values]
