"""A tiny Llama whose norms have weights of their own, some of them negative, and transforms of every kind for it."""

from __future__ import annotations

import torch
from families import SMALL
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from resting.sparsifier import Transform
from resting.sparsifier.transform import random_rotation


def build(config: PretrainedConfig | None = None, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(0)
    config = config or LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_config(config).eval().to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.4 if "norm" in name else 0.0, 0.5 if "norm" in name else 0.15)
    return model


def q(seed: int, size: int = 32) -> Tensor:
    return random_rotation(size, seed)


def transforms(blocks: int = 3) -> dict[str, Transform]:
    each = tuple(range(blocks))
    pairs = tuple(range(0, 2 * blocks, 2)), tuple(range(1, 2 * blocks, 2))
    heads = tuple(torch.stack([q(20 + 2 * block, 8), q(21 + 2 * block, 8)]) for block in each)
    one = (0,) * blocks
    return {
        "folded": Transform("folded", True),
        "global": Transform("global", True, (q(0),), one, one),
        "block": Transform("block", True, tuple(map(q, each)), each, each),
        "two": Transform("two", True, tuple(map(q, range(2 * blocks))), *pairs),
        "heads": Transform("heads", heads=heads),
        "both": Transform("both", True, (q(0),), one, one, heads),
    }


class ExactNorm(torch.nn.Module):
    """RMSNorm after its definition, in the dtype it is called with: that of transformers computes in float32."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt()


def exact(model: torch.nn.Module) -> torch.nn.Module:
    """The model in float64, norms too."""
    model = model.double()
    for owner in list(model.modules()):
        for name, child in owner.named_children():
            if type(child).__name__ == "LlamaRMSNorm":
                setattr(owner, name, ExactNorm(child))
    return model
