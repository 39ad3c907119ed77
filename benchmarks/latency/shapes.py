"""Models of published shapes with random weights: nothing is downloaded, and as much is read as of the real one."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.errors import SuiteError

# Configurations as published with the models; embeddings are tied where theirs are.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 97,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
"""``tiny`` is for tests."""


def random_model(name: str, dtype: torch.dtype) -> Any:
    """A model of the shape `name` with seeded random weights, in evaluation mode.

    Raises
    ------
    SuiteError
        If the shape is not known.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    if name not in SHAPES:
        raise SuiteError(f"unknown shape {name!r}; allowed: {', '.join(SHAPES)}")
    config = LlamaConfig(**SHAPES[name], max_position_embeddings=4096)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def name_of(shape: str) -> str:
    """As rows show it."""
    return f"{shape} shape (random weights)"
