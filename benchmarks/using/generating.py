"""Writes text with a model, shows it as it comes, and takes the time of every token."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from resting.benchmarks.errors import BenchmarkError, first_line
from resting.benchmarks.quality import limits

COLD = 4
"""Tokens at the beginning whose time is not taken: code is compiled and caches grow."""


@dataclass(frozen=True)
class Setting:
    """Says how text is written.

    Attributes
    ----------
    max_new_tokens : int
    temperature : float
        0 takes the likeliest token every time.
    seed : int
        Of sampling.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Written:
    """Holds what a model wrote.

    Attributes
    ----------
    ids : Tensor [1, prompt + new]
    prompt : int
        Tokens of the prompt.
    times : list of float
        When each new token came, in seconds.
    """

    ids: Tensor
    prompt: int
    times: list[float]

    @property
    def new(self) -> int:
        """Number of new tokens."""
        return self.ids.shape[1] - self.prompt

    @property
    def per_token(self) -> float | None:
        """Seconds a token, without the first ones; None where there were too few."""
        warm = self.times[COLD:]
        return (warm[-1] - warm[0]) / (len(warm) - 1) if len(warm) > 1 else None


class Clock(TextStreamer):
    """Shows text on standard output as it comes, and notes when each token came.

    Parameters
    ----------
    tokenizer : transformers.PreTrainedTokenizer
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []
        self._calls = 0

    def put(self, value: Tensor) -> None:
        """Take a token; the first call brings the prompt."""
        if self._calls:
            self.times.append(time.perf_counter())
        self._calls += 1
        super().put(value)


def encode(model: Any, tokenizer: Any, prompt: str, chat: bool, new: int) -> Tensor:
    """Split a prompt into tokens, after the chat template where asked for.

    Returns
    -------
    Tensor [1, tokens]

    Raises
    ------
    BenchmarkError
        If the prompt has no token, one that the model does not have, or too many of them; or if there is no chat
        template, or it refuses the prompt.
    """
    if not chat:
        ids = tokenizer(prompt).input_ids
    elif not getattr(tokenizer, "chat_template", None):
        raise BenchmarkError("--chat: the tokenizer of this model has no chat template; allowed: without --chat")
    else:
        turns = [{"role": "user", "content": prompt}]
        try:
            found = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        except Exception as error:  # a template is a program of its own
            raise BenchmarkError(f"--chat: the chat template refuses the prompt: {first_line(error)}") from error
        ids = found["input_ids"]
    if not ids:
        raise BenchmarkError(f"--prompt {prompt!r} has no token; allowed: at least one")
    limits.check_ids(ids, model, tokenizer, "the prompt")
    limit = limits.positions(model.config)
    if limit is not None and len(ids) >= limit:
        raise BenchmarkError(f"the prompt has {len(ids)} tokens; allowed: up to {limit - 1}, of a context of {limit}")
    if limit is not None and len(ids) + new > limit:
        raise BenchmarkError(
            f"--max-new-tokens {new} after a prompt of {len(ids)} tokens is beyond the context of {limit}; "
            f"allowed: up to {limit - len(ids)}"
        )
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)


def write(model: Any, tokenizer: Any, ids: Tensor, setting: Setting) -> Written:
    """Continue a prompt with ``model.generate``, whatever the model is at that moment, and show the text.

    Parameters
    ----------
    ids : Tensor [1, tokens]
        The prompt.
    """
    clock = Clock(tokenizer)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": setting.temperature}
    if setting.temperature == 0.0:
        sampling = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    torch.manual_seed(setting.seed)
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=setting.max_new_tokens,
            pad_token_id=_padding(model, tokenizer),
            streamer=clock,
            **sampling,
        )
    return Written(found, ids.shape[1], clock.times)


def _padding(model: Any, tokenizer: Any) -> Any:
    """Give `generate` a number for padding, without which it warns; one sequence is never padded."""
    end = getattr(model.generation_config, "eos_token_id", None)
    first = end[0] if isinstance(end, list) and end else end
    return first if tokenizer.pad_token_id is None else tokenizer.pad_token_id
