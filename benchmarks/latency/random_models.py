"""Models of published shapes with random weights: nothing is downloaded, and as much is read as of the real one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.errors import SuiteError
from resting.sparsifier.low_rank import Algorithm, Factors

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
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rope_theta": 500000.0,
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    },
    "mistral-7b": {
        "model_type": "mistral",
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
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


def random_model(name: str, dtype: torch.dtype, device: str = "cpu") -> Any:
    """A model of the shape `name` with seeded random weights, in evaluation mode.

    Raises
    ------
    SuiteError
        If the shape is not known.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in SHAPES:
        raise SuiteError(f"unknown shape {name!r}; allowed: {', '.join(SHAPES)}")
    shape = {"model_type": "llama", "max_position_embeddings": 4096} | SHAPES[name]
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape), dtype=dtype).eval()


class RandomFactors(Factors):
    """Low-rank parts of random weights: random as well, since decompositions would take longer than what is timed."""

    def low_rank(self, weight: Tensor, rank: int, algorithm: Algorithm = "exact") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        out, inputs = weight.shape
        u, v = (torch.randn(shape, generator=generator) / 100 for shape in ((out, rank), (rank, inputs)))
        return u, v


def name_of(shape: str) -> str:
    """As rows show it."""
    return f"{shape} shape (random weights)"
