"""Decoding token by token: a model under a plan or not, and the dense paths of a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.latency import timing
from resting.sparsifier import DecodeOnly, Meter, Plan, Rule, final_hidden
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.decoder import decoding
from resting.sparsifier.fingerprint import of_model
from resting.sparsifier.quantised.formats import Format

DENSE_PATHS = ("eager", "static cache", "compiled", "kernels")
"""Of a dense model on a CPU, as they are tried."""
DENSE_TRIAL = 12
"""Tokens that every dense path decodes to find the fastest."""


class Decode:
    """Decodes with a model after a prompt: one step at a time, always on the same tokens.

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
        """Compute the logits of the next token."""
        logits = self._forward(self.step_model, self.ids[:, self.at : self.at + 1])
        self.at += 1
        return logits

    def _forward(self, model: Any, ids: Tensor) -> Tensor:
        logits: Tensor = model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1).logits
        return logits


def neutral(model: Any) -> Plan:
    """Make a plan under which nothing rests: the dense model through the kernels, where they are faster."""
    rules = {site: Rule() for site in Decoder.of(model).sites()}
    return Plan(rules, method="dense", target=0.0, nominal=0.0, model=of_model(model))


@contextmanager
def dense_path(model: Any, name: str, threads: int) -> Iterator[Callable[[Tensor, int], Decode]]:
    """Run the dense model on one of `DENSE_PATHS`; what is given begins to decode after a prompt."""
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


def fastest_dense(
    model: Any, ids: Tensor, prompt: int, threads: int, paths: Sequence[str] = DENSE_PATHS
) -> tuple[str, dict[str, float | str]]:
    """Find the fastest of the dense paths on this machine.

    Returns
    -------
    str
        Its name.
    dict of str to float or str
        Seconds per token of every path, or why it did not run.
    """
    found: dict[str, float | str] = {}
    steps = min(DENSE_TRIAL, ids.shape[1] - prompt - 3)
    for name in paths:
        try:
            with dense_path(model, name, threads) as begin, torch.inference_mode():
                decode = begin(ids, prompt)
                decode.step(), decode.step()  # compiles
                found[name] = timing.p20(timing.interleaved({name: decode.step}, steps)[name])
        except Exception as error:  # a compiler that is missing, a cache that a model does not take
            found[name] = str(error).strip().splitlines()[0][:200]
    seconds = {name: t for name, t in found.items() if isinstance(t, float)}
    return min(seconds, key=lambda name: seconds[name]), found


def what_is_read(model: Any, plan: Plan, ids: Tensor, prompt: int, form: Format | None = None) -> dict[str, float]:
    """Measure what the tokens after the prompt read, from the masks of the definition.

    Returns
    -------
    dict of str to float
        The byte ``sparsity``, and of a model whose block linears are stored in `form` also the ``bits`` that a token
        reads, over the weights of all matrices of the blocks.
    """
    meter = Meter()
    with torch.inference_mode(), plan.applied(model, DecodeOnly(prompt), meter):
        final_hidden(model, ids)
    found = {"sparsity": meter.byte_sparsity()}
    return found if form is None else found | {"bits": meter.bits_read(form.bits, form.bits_beside)}


def weight_bytes(model: Any) -> tuple[int, int]:
    """Count the bytes that a dense step reads: of the blocks' matrices, and of everything else (output layer, norms).

    Of experts it reads those that a token goes through.
    """
    decoder = Decoder.of(model)
    size = decoder.projection(decoder.sites()[0]).weight.itemsize
    stored = size * (sum(sum(found.dense.values()) for found in decoder.found))
    stored += size * sum(decoder.projection(site).elements for site in decoder.matrices)
    everything = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    rest = everything - stored - (0 if tied else model.get_input_embeddings().weight.nbytes)
    return round(size * decoder.elements), rest
