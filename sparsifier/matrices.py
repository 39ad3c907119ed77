"""Counts the matrices of a block, and those of them that its sites hold."""

from __future__ import annotations

from collections.abc import Iterable

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


def held(block: nn.Module, modules: Iterable[nn.Module]) -> tuple[float, list[str]]:
    """Tells how much of a block's matrices some of its modules hold.

    Returns
    -------
    share : float
        Of the elements of all matrices of the block.
    others : list of str
        The matrices that none of `modules` holds.
    """
    counted, wanted = matrices(block), set(modules)
    prefixes = tuple(f"{name}." for name, module in block.named_modules(remove_duplicate=False) if module in wanted)
    others = [name for name in counted if not name.startswith(prefixes)]
    return 1.0 - sum(counted[name] for name in others) / sum(counted.values()), others
