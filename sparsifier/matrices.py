"""Counts the matrices of a block."""

from __future__ import annotations

from torch import nn


def matrices(block: nn.Module) -> dict[str, int]:
    """Counts the elements of every matrix of a block, by name.

    A matrix is whatever has two dimensions or more: weights of linear layers and routers, experts fused into one
    tensor [experts, in, out], embeddings, and stored tensors that are no parameters. Norms and biases have one.
    """
    found = {name: p.numel() for name, p in block.named_parameters(remove_duplicate=False) if p.dim() > 1}
    buffers = {name: b.numel() for name, b in block.named_buffers(remove_duplicate=False) if b.dim() > 1}
    if buffers:  # those of a model's file, as codes of quantised weights; not tables that are computed, as causal masks
        stored = block.state_dict(keep_vars=True)
        found |= {name: size for name, size in buffers.items() if name in stored}
    return found
