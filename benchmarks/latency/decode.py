"""Decoding token by token: the dense model and the sparse one, in turn, each step timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.latency import timing
from resting.sparsifier import DecodeOnly, Meter, Plan, Rule, TokenPolicy
from resting.sparsifier.decoding.decoder import decoding
from resting.sparsifier.fingerprint import of_model
from resting.sparsifier.sites import Decoder

DENSE_TRIAL = 12
"""Tokens that every dense path decodes to find the fastest."""


class Decode:
    """A model between a prompt and its next tokens: one step at a time, always on the same tokens.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Under a plan or not.
    ids : Tensor [1, prompt + steps]
        Tokens are forced, so that every model decodes the same text.
    prompt : int
    static : bool
        Cache of fixed size, which graphs and compilers need.
    """

    def __init__(self, model: Any, ids: Tensor, prompt: int, static: bool = False) -> None:
        from transformers import DynamicCache, StaticCache

        self.model, self.ids, self.at = model, ids, prompt
        size = {"max_cache_len": ids.shape[1]} if static else {}
        self.cache = (StaticCache if static else DynamicCache)(config=model.config, **size)
        self.step_model = model
        began = time.perf_counter()
        self._forward(model, ids[:, :prompt])
        self.prefill = time.perf_counter() - began

    def step(self, _: int = 0) -> Tensor:
        """Logits of the next token."""
        logits = self._forward(self.step_model, self.ids[:, self.at : self.at + 1])
        self.at += 1
        return logits

    def _forward(self, model: Any, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits


def neutral(model: Any) -> Plan:
    """A plan under which nothing rests: the dense model through the kernels, where they are the faster way."""
    rules = {site: Rule() for site in Decoder.of(model).sites()}
    return Plan(rules, method="dense", target=0.0, nominal=0.0, model=of_model(model))


@contextmanager
def dense_path(model: Any, name: str, threads: int) -> Iterator[Callable[[Tensor, int], Decode]]:
    """One way to run the dense model: ``eager``, ``static cache``, ``compiled`` or ``kernels``."""
    if name == "kernels":
        with decoding(neutral(model), model, threads=threads):
            yield lambda ids, prompt: Decode(model, ids, prompt)
        return

    def begin(ids: Tensor, prompt: int) -> Decode:
        decode = Decode(model, ids, prompt, static=name != "eager")
        if name == "compiled":
            decode.step_model = compiled
        return decode

    compiled = torch.compile(model, dynamic=False) if name == "compiled" else None
    yield begin


def fastest_dense(model: Any, ids: Tensor, prompt: int, threads: int) -> tuple[str, dict[str, float | str]]:
    """The fastest of the dense paths on this machine.

    Returns
    -------
    str
        Its name.
    dict of str to float or str
        Seconds a token of every path, or why it did not run.
    """
    found: dict[str, float | str] = {}
    steps = min(DENSE_TRIAL, ids.shape[1] - prompt - 3)
    for name in ("eager", "static cache", "compiled", "kernels"):
        try:
            with dense_path(model, name, threads) as begin, torch.inference_mode():
                decode = begin(ids, prompt)
                decode.step(), decode.step()  # compiles
                found[name] = timing.fast(timing.interleaved({name: decode.step}, steps)[name])
        except Exception as error:  # a compiler that is missing, a cache that a model does not take
            found[name] = str(error).strip().splitlines()[0][:200]
    seconds = {name: t for name, t in found.items() if isinstance(t, float)}
    return min(seconds, key=lambda name: seconds[name]), found


def compare(
    dense: Any,
    sparse: Any,
    plan: Plan,
    ids: Tensor,
    prompt: int,
    tokens: TokenPolicy,
    path: str,
    threads: int,
    base: tuple[Any, Plan] | None = None,
) -> dict[str, Any]:
    """Decode the same text with both models, in turn.

    Parameters
    ----------
    dense, sparse : transformers.PreTrainedModel
        Two copies of one model.
    path : str
        How the dense one runs (`fastest_dense`).
    base : (transformers.PreTrainedModel, Plan), optional
        A third copy, and what `plan` adds to.

    Returns
    -------
    dict
        Raw seconds of every step (``dense``, ``sparse``, ``base``), of the prompts (``prefill_dense``,
        ``prefill_sparse``), and the ``sparsity`` of the decoded tokens.
    """
    steps = ids.shape[1] - prompt - 1
    sparsity = measured_sparsity(sparse, plan, ids, prompt)
    with ExitStack() as stack:
        begin = stack.enter_context(dense_path(dense, path, threads))
        stack.enter_context(decoding(plan, sparse, tokens, threads))
        ways: dict[str, Callable[[], Decode]] = {
            "dense": lambda: begin(ids, prompt),
            "sparse": lambda: Decode(sparse, ids, prompt),
        }
        if base is not None:
            third = stack.enter_context(decoding(base[1], base[0], tokens, threads))
            ways["base"] = lambda: Decode(third, ids, prompt)
        stack.enter_context(torch.inference_mode())
        prefill = {name: [way().prefill for _ in range(3)] for name, way in ways.items()}
        running = {name: way() for name, way in ways.items()}
        times = timing.interleaved({name: decode.step for name, decode in running.items()}, steps)
    return {**times, **{f"prefill_{name}": values for name, values in prefill.items()}, "sparsity": sparsity}


def measured_sparsity(model: Any, plan: Plan, ids: Tensor, prompt: int) -> float:
    """Byte sparsity of the tokens after the prompt, from the masks of the definition."""
    meter = Meter()
    with torch.inference_mode(), plan.applied(model, DecodeOnly(prompt), meter):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return meter.byte_sparsity()


def weight_bytes(model: Any) -> tuple[int, int]:
    """Bytes that a dense step reads: of the block linears, and of everything else (output layer, norms)."""
    decoder = Decoder.of(model)
    linears = sum(decoder.linear(site).weight.nbytes for site in decoder.sites())
    everything = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    rest = everything - linears - (0 if tied else model.get_input_embeddings().weight.nbytes)
    return linears, rest
