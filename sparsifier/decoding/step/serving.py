"""Puts a fast step in front of a model's `forward`: single tokens go through the step, all else where it went."""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from types import MethodType
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, ModelOutput

from resting.sparsifier.decoding.step.arguments import Arguments, LateCheck, contents_fit, shapes_fit
from resting.sparsifier.decoding.step.contract import Step
from resting.sparsifier.decoding.step.unchanged import Change, Hooks, Unchanged
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import TokenPolicy

Follow = Callable[[Any], None]


class Served:
    """Stands in the place of a model's `forward`, and answers by a step where that gives what the model's own gives.

    Attributes
    ----------
    step : Step
    steps : int
        Tokens that the step has computed.
    """

    def __init__(
        self, model: Any, step: Step, tokens: TokenPolicy, own: Callable[..., Any], follow: Follow | None = None
    ) -> None:
        self._model, self.step, self._policy, self._own, self._follow = model, step, tokens, own, follow
        self._arguments = Arguments(own, model.config)
        self._hooks = Hooks(model)
        self._now = Unchanged(model)
        self._device = step.store.keys[0].device
        self._waits = self._device.type == "cpu"  # else the device computes while the host looks at the weights
        self._late = None if self._waits else LateCheck(self._device)
        self._looks_first = self._waits
        self._seen = False  # whether a mask of the present cache was looked at before its token was computed
        self._look_late = False  # whether that of the present call is to be looked at afterwards
        self._parameters = list(model.parameters())
        self._output = _output_of(own)
        self.steps = 0
        self._lock = threading.RLock()  # the store and the step's memory are those of one call at a time
        functools.update_wrapper(self, own)  # `generate` looks at the signature

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """Gives a copy of the model its own `forward`: the step is that of one model."""
        return copy.deepcopy(self._own, memo)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Computes what the model's own `forward` computes of these arguments, for one thread after another."""
        if torch.compiler.is_compiling():
            return self._own(*args, **kwargs)
        with self._lock:
            return self._answered(args, kwargs)

    def _answered(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = self._arguments.named(args, kwargs)
        if given is None:
            return self._own(*args, **kwargs)
        self._check_earlier_calls()
        past = self._past_of_a_step(given)
        if past > 0:
            logits = self._logits(given["input_ids"], given["past_key_values"], past)
            if logits is not None:
                if self._late is not None and self._look_late:
                    self._late.add(given, past)
                return self._answer(logits, given)
        return self._by_definition(args, kwargs, given)

    def _past_of_a_step(self, given: dict[str, Any]) -> int:
        """Gives the number of tokens before the one that the step is to compute; 0 where it is not to."""
        cache = given.get("past_key_values")
        if cache is None or not self._arguments.ask_for_a_step(given) or not self._is_plain_inference():
            return 0
        if given["input_ids"].device != self._device:
            return 0
        store = self.step.store
        held = store.length_of(cache)
        past = held if held > 0 else _length(cache)
        if past < 1 or self._policy.dense_tokens(1, past) or not shapes_fit(given, past, self._device):
            return 0
        self._look_late = self._late is not None and self._seen and held > 0
        if not self._look_late and not contents_fit(given, past):
            return 0
        if not store.takes(cache, past):
            return 0
        self._seen = True
        return past

    def _is_plain_inference(self) -> bool:
        """Tells whether nothing but the logits is wanted of the model: no gradients, other dtypes or inner hooks."""
        if self._model.training or torch.is_autocast_enabled(self._device.type) or self._hooks.found():
            return False
        return not (torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self._parameters))

    def _logits(self, token: Tensor, cache: Any, past: int) -> Tensor | None:
        """Computes the logits by the step, with the weights as they are; None where it knows the modules no longer."""
        store = self.step.store
        store.ensure(past + 1)
        change = self._now.change() if self._looks_first else Change.NOTHING
        if self._follow is not None and change is not Change.MODULES:
            self._follow(cache)
        logits = self.step(token, past) if change is Change.NOTHING else None
        if not self._looks_first:
            change = self._now.change()
        if change is Change.MODULES:
            self._looks_first = True
            return None
        if change is Change.WEIGHTS:
            self.step.renew()
            self._now.renew()
            self._parameters = list(self._model.parameters())
            logits = self.step(token, past)
        self._looks_first = self._waits
        store.advance(past + 1)
        self.steps += 1
        assert logits is not None
        return logits.clone()

    def _answer(self, logits: Tensor, given: dict[str, Any]) -> Any:
        output = self._output(logits=logits, past_key_values=given["past_key_values"])
        return output.to_tuple() if self._arguments.wants_tuple(given) else output

    def _by_definition(self, args: tuple[Any, ...], kwargs: dict[str, Any], given: dict[str, Any]) -> Any:
        """Calls the model's own `forward`."""
        self._seen = False
        cache, ids, mask = (given.get(name) for name in ("past_key_values", "input_ids", "attention_mask"))
        store, is_prompt, is_static = self.step.store, False, False
        if isinstance(cache, Cache) and isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1:
            is_prompt, is_static = ids.shape[1] > 1 or not _length(cache), cache.is_compileable
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2) and store.length_of(cache) >= 0:
            store.settle()  # such a mask was made for the layers as they were
        output = self._own(*args, **kwargs)
        if isinstance(output, ModelOutput) and _has_logits_and_cache(output):
            self._output = type(output)
        if is_prompt and is_static and self._model_decodes():
            # Else `generate` makes masks for a static cache, of four dimensions, and calls with nothing else.
            store.takes_if_it_fits(cache, _length(cache))
        return output

    def _model_decodes(self) -> bool:
        return not self._model.training and not torch.is_grad_enabled()

    def _check_earlier_calls(self) -> None:
        if self._late is not None and self._late.has_failed():
            self._late.reset()
            raise SparsifierError(
                "an earlier single token came with an attention mask that hides tokens, or with a position that is not "
                "its place in the cache, and its logits are wrong: on a GPU the first token after a prompt decides "
                "whether these are looked at; allowed: masks of ones, or padding in the prompt already"
            )

    def finish(self) -> None:
        """Waits for what was asked of a GPU.

        Raises
        ------
        SparsifierError
            If a call was answered that should not have been.
        """
        if self._late is not None:
            self._late.wait()
        self._check_earlier_calls()


@contextmanager
def served(model: Any, step: Step, tokens: TokenPolicy, follow: Follow | None = None) -> Iterator[Served]:
    """Answers calls of `model` by `step` inside the ``with`` block, where that gives what the model's forward gives.

    That is: one token after those of a cache, sparse under `tokens`, of which nothing but the logits is wanted. All
    other calls go to the model's own `forward` as they are. Weights that were written to are read again, and where
    modules were exchanged or hooks put on them, the model's own `forward` computes.

    Parameters
    ----------
    model : PreTrainedModel
    step : Step
    tokens : TokenPolicy
    follow : callable, optional
        Is called with the cache before the step computes a token after those in it.

    Yields
    ------
    Served
        What stands in the place of ``model.forward``.

    Raises
    ------
    SparsifierError
        If the model is served already; from calls, if a static cache is full.
    """
    own = model.forward
    if isinstance(inspect.unwrap(own, stop=lambda found: isinstance(found, Served)), Served):
        raise SparsifierError(f"{type(model).__name__} decodes under one plan at a time: leave that `with` block first")
    answers = Served(model, step, tokens, own, follow)
    instead: dict[str, Any] = {"forward": answers}
    if hasattr(model, "get_compiled_call"):
        instead["get_compiled_call"] = MethodType(_uncompiled, model)
    before = {name: model.__dict__[name] for name in instead if name in model.__dict__}
    model.__dict__.update(instead)
    try:
        yield answers
        answers.finish()
    finally:
        for name in instead:
            model.__dict__.pop(name, None)
        model.__dict__.update(before)
        try:
            step.store.settle()
        finally:
            step.restore()


def _uncompiled(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Gives `generate` the model as it is: with a static cache it would compile it, and again for every length."""
    return model.__call__


def _length(cache: Any) -> int:
    """Counts the tokens of a cache; 0 for those without keys in the first layer, which nothing is asked about."""
    if not isinstance(cache, Cache) or not isinstance(next(iter(cache.layers), None), CacheLayerMixin):
        return 0
    return int(cache.get_seq_length())


def _output_of(forward: Callable[..., Any]) -> type:
    """Gives the class that a `forward` says it answers with."""
    try:
        said = get_type_hints(forward).get("return")
    except (NameError, TypeError, AttributeError):  # a name that is known to type checkers only
        said = None
    fit = (kind for kind in (said, *get_args(said)) if isinstance(kind, type) and issubclass(kind, ModelOutput))
    return next((kind for kind in fit if _has_logits_and_cache(kind)), CausalLMOutputWithPast)


def _has_logits_and_cache(output: Any) -> bool:
    names = {field.name for field in fields(output)} if is_dataclass(output) else set()
    return {"logits", "past_key_values"} <= names
