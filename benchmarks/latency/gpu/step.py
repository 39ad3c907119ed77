"""One decoded token of a Llama-like model in few launches, of fixed shapes: for a compiler, and for a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency.gpu.blocks import Block, KernelBlock
from resting.benchmarks.latency.gpu.weights import Rules, Weights
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.contract import Product
from resting.sparsifier.decoding.cuda_products import CudaColumns, Norm


class Step(nn.Module):
    """Decodes one token after another with the weights of a model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Of the Llama, Mistral, Qwen2 or Qwen3 family.
    weights : list of dict of str to Weights
        Of every block (`weights.fuse`).
    length : int
        Of the cache, in tokens.
    rules : dict of Site to Rule, optional
        Of a plan, for the kernels; without it every product is the library's.
    head : callable
        Product of the output layer.

    Raises
    ------
    SuiteError
        If the model's heads or its rotary embedding are not what attention is written for.
    SparsifierError
        If its activation is not what the kernels are written for.
    """

    def __init__(
        self, model: Any, weights: list[dict[str, Weights]], length: int, rules: Rules | None, head: Product
    ) -> None:
        super().__init__()
        decoder = Decoder.of(model)
        device = model.get_output_embeddings().weight.device
        self.token = torch.zeros(1, 1, dtype=torch.long, device=device)
        self.at = torch.zeros(1, dtype=torch.long, device=device)
        trunk: Any = decoder.trunk
        table = trunk.rotary_emb(trunk.embed_tokens.weight[:1, None], torch.arange(length, device=device)[None])
        self.cos, self.sin = (t[0].contiguous() for t in table)
        first: Any = decoder.layers[0]
        size = first.self_attn.head_dim
        if self.cos.shape[-1] != size:
            raise SuiteError(f"a step turns whole heads, of {size} numbers, and here {self.cos.shape[-1]} are turned")
        self.entry, self.exit = Entry(trunk.embed_tokens), Exit(trunk.norm, head)
        blocks: list[nn.Module] = [
            Block(layer, of, length) if rules is None else KernelBlock(layer, i, of, rules, length)
            for i, (layer, of) in enumerate(zip(decoder.layers, weights))
        ]
        self.blocks = nn.ModuleList(blocks)
        self.by_kernels = rules is not None

    def forward(self) -> Tensor:
        """Compute logits [1, 1, vocabulary] after `token` at position `at`, which moves on by one."""
        x, more = self.entry(self.token, self.by_kernels)
        for block in self.blocks:
            x, more = block(x, more, self.cos, self.sin, self.at)
        logits: Tensor = self.exit(x, more, self.by_kernels)
        self.at += 1
        return logits


class Entry(nn.Module):
    """Gives the embedding, and what a block takes with it: nothing to add, or the sum of its squares."""

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, token: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
        x = self.embed(token)
        return x, x.float().square().sum()[None] if squared else torch.zeros_like(x)


class Exit(nn.Module):
    """Applies the last norm and the output layer."""

    def __init__(self, norm: Any, head: Product) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, x: Tensor, more: Tensor, squared: bool) -> Tensor:
        if not squared:
            return self.head(self.norm(x + more))
        if isinstance(self.head, CudaColumns):
            return self.head.fused(x, Norm(more, self.norm.weight, self.norm.variance_epsilon))[0]
        return self.head(self.norm(x))
