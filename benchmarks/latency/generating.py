"""Timing of `model.generate` itself, token by token: what a user of transformers gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.latency import timing
from resting.benchmarks.latency.decode import neutral
from resting.sparsifier.decoding import decoding

ROUNDS = 3
"""How often every alternative generates."""
TRIAL = 16
"""Tokens that every dense path generates to find the fastest."""
FIRST = 4
"""Tokens of a text that are not counted: the prompt's, and those by which caches are made."""
OPTIONS: dict[str, dict[str, Any]] = {
    "eager": {},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "compiled": {"cache_implementation": "static"},
}
"""What `generate` is asked for, by dense path."""


class Stamps:
    """Notes when tokens come, as a streamer."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        """Notes the time; the first call brings the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Ends the text."""

    @property
    def seconds(self) -> list[float]:
        """Gives the seconds of every token but the first."""
        return [after - before for before, after in zip(self.times[FIRST:], self.times[FIRST + 1 :])]


def generate(model: Any, prompt: Tensor, tokens: int, options: Mapping[str, Any] | None = None) -> list[float]:
    """Generate greedily, and give the seconds of every token but the first few.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Under a plan or not.
    prompt : Tensor [1, n]
    tokens : int
        Generated in any case: no token ends the text.
    options : dict, optional
        More arguments of `generate`.
    """
    stamps = Stamps()
    more = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": tokens, "streamer": stamps}
    with torch.inference_mode():
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **more, **(options or {}))
    return stamps.seconds


def in_turn(calls: Mapping[str, Callable[[], list[float]]]) -> timing.Times:
    """Generate with every alternative in turn; the first round is not counted."""
    names = list(calls)
    times: timing.Times = {name: [] for name in names}
    for turn in range(ROUNDS + 1):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            found = calls[name]()
            if turn:
                times[name] += found
    return times


def compared(dense: Any, sparse: Any, ids: Tensor, prompt: int, options: Mapping[str, Any]) -> timing.Times:
    """Generate in turn as many tokens as `ids` [1, prompt + tokens] has after its prompt: raw seconds of both."""
    text, tokens = ids[:, :prompt], ids.shape[1] - prompt
    return in_turn(
        {
            "generate_dense": partial(generate, dense, text, tokens, options),
            "generate_sparse": partial(generate, sparse, text, tokens),
        }
    )


@contextmanager
def dense_way(model: Any, path: str, threads: int) -> Iterator[dict[str, Any]]:
    """Let the dense model generate on one of its paths; what is given are the arguments of `generate`."""
    if path == "kernels":
        with decoding(neutral(model), model, threads=threads):
            yield {}
        return
    if path != "compiled" or model.device.type == "cuda":
        yield OPTIONS[path]
        return
    from transformers import CompileConfig

    config = CompileConfig(dynamic=False, mode="default")
    config._compile_all_devices = True  # `generate` compiles on a GPU alone, unless it is asked
    yield OPTIONS[path] | {"compile_config": config}


def fastest_dense(model: Any, prompt: Tensor, paths: Sequence[str], threads: int) -> tuple[str, dict[str, float | str]]:
    """Find the dense path whose `generate` is the fastest.

    Returns
    -------
    str
        Its name.
    dict of str to float or str
        Seconds per token of every path, or why it did not run.
    """
    found: dict[str, float | str] = {}
    for path in paths:
        try:
            with dense_way(model, path, threads) as options:
                generate(model, prompt, TRIAL, options)  # compiles
                found[path] = timing.p20(generate(model, prompt, TRIAL, options))
        except Exception as error:  # a compiler that is missing, a cache that a model does not take
            found[path] = " ".join(str(error).split())[:200]
    seconds = {name: t for name, t in found.items() if isinstance(t, float)}
    return min(seconds, key=lambda name: seconds[name]), found
