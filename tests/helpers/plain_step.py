"""A step of one token that calls the model's own forward over a store, and counts its calls."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from decoders import config
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from resting.sparsifier.decoding.step.serving import served
from resting.sparsifier.decoding.step.store import Store
from resting.sparsifier.policy import AllButFirst, TokenPolicy

WINDOW = 6
WINDOWS = {"mistral": {"sliding_window": WINDOW}, "gemma3_text": {"sliding_window": WINDOW}}
WINDOWS["gemma3_text"]["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]


def tiny(family: str, seed: int = 0, **more: Any) -> Any:
    """A random model of `family` without an end of text; Mistral and Gemma have small windows."""
    settings = config(family)
    for name, value in (WINDOWS.get(family, {}) | more).items():
        setattr(settings, name, value)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    model.generation_config.eos_token_id = None
    return model


class PlainStep:
    """Computes a token by the model's own forward over a throw-away cache of all that the store has."""

    def __init__(self, model: Any) -> None:
        self.own = model.forward
        settings = model.config
        groups = settings.num_key_value_heads
        size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
        self.store = Store([(groups, size, size)] * settings.num_hidden_layers, torch.float32, "cpu")
        self.calls: list[int] = []
        self.renewed = self.restored = 0
        self.logits = torch.zeros(1, 1, settings.vocab_size)

    @torch.no_grad()
    def __call__(self, token: Tensor, past: int) -> Tensor:
        self.calls.append(past)
        cache = DynamicCache()
        for i, (keys, values) in enumerate(zip(self.store.keys, self.store.values)):
            cache.update(keys[None, :, :past], values[None, :, :past], i)
        self.logits.copy_(self.own(token, past_key_values=cache, use_cache=True).logits)
        for i, layer in enumerate(cache.layers):
            self.store.keys[i][:, past] = layer.keys[0, :, -1]
            self.store.values[i][:, past] = layer.values[0, :, -1]
            # What a step may not read: places that it has not come to.
            self.store.keys[i][:, past + 1 :] = self.store.values[i][:, past + 1 :] = float("nan")
        return self.logits  # the same memory at every call

    def renew(self) -> None:
        self.renewed += 1

    def restore(self) -> None:
        self.restored += 1


@contextmanager
def stepping(model: Any, tokens: TokenPolicy = AllButFirst(1)) -> Any:
    """Serves `model` by a `PlainStep`, and yields that."""
    step = PlainStep(model)
    with served(model, step, tokens):
        yield step
