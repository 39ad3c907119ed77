"""Texts, and comparisons of what a served model and the model alone answer."""

from __future__ import annotations

import torch
from transformers import DynamicCache

FAMILIES = ("llama", "mistral", "gemma3_text", "qwen3")
IDS = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
TOKEN = IDS[:, 9:10]
ONES = torch.ones(1, 10, dtype=torch.long)
HIDDEN = torch.cat([torch.zeros(1, 2, dtype=torch.long), ONES[:, 2:]], 1)


def equal(found, expected) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def generated(model, prompt: int = 9, new: int = 8, seed: int = 0, **settings):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": new, "do_sample": False} | settings
    return model.generate(IDS[:, :prompt], return_dict_in_generate=True, output_logits=True, **settings)


def same_generation(found, expected) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits)
    equal(torch.stack(found.logits), torch.stack(expected.logits))


def decoded(model, ids, prompt):
    """Logits token by token, with a cache, after a prompt."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=ids[:, :prompt], past_key_values=cache)
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(prompt, ids.shape[1])]
    return torch.cat(steps, 1)


class Turn:
    """A cache of nine tokens, of `model`, and a call of the tenth."""

    def __init__(self, model, context=None):
        self.model = model
        self.cache = model(IDS[:, :9], use_cache=True).past_key_values

    def __call__(self, *args, **kwargs):
        return self.model(*args, **({"past_key_values": self.cache} | kwargs))
