"""An own count of what a token reads of a model's blocks under masks: from hooks and the formula, without the meter."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier import Decoder, Plan, SparseLinear
from resting.sparsifier.sparse_experts import SparseExperts


def of_blocks(model: nn.Module) -> tuple[int, dict[int, int]]:
    """Elements of all matrices of the blocks but experts, and those of one expert by block."""
    always, expert = 0, {}
    for i, layer in enumerate(Decoder.of(model).layers):
        stored = {*dict(layer.named_parameters()), *layer.state_dict()}
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers()):
            if tensor.dim() < 2 or name not in stored or name.endswith("_proj_bias"):
                continue
            if tensor.dim() == 3 and name.endswith(("experts.gate_up_proj", "experts.up_proj", "experts.down_proj")):
                expert[i] = expert.get(i, 0) + tensor[0].numel()
            else:
                always += tensor.numel()
    return always, expert


class Count:
    """What the sparse tokens of a forward read, and what they would read of the dense model."""

    def __init__(self, model: nn.Module, dense_tokens: int) -> None:
        self.always, self.expert = of_blocks(model)
        self.first, self.unread, self.tokens, self.routed = dense_tokens, 0.0, 0, 0.0

    def sparsity(self) -> float:
        """Share that is left unread."""
        return self.unread / (self.tokens * self.always + self.routed)


def rests(x: Tensor, threshold: float) -> Tensor:
    """Share of the entries of each token that are not above the threshold."""
    return (~(x.abs() > threshold)).double().mean(-1)


def counted(model: nn.Module, ids: Tensor, plan: Plan) -> Count:
    """Runs `ids` [1, length] under `plan`, all but the first token sparse, and counts its resting inputs.

    For plans of thresholds at matrices, and of thresholds at ``act`` alone.
    """
    count, blocks = Count(model, 1), Decoder.of(model).layers
    count.tokens = ids.numel() - 1
    threshold = {site: float(rule.threshold) for site, rule in plan.rules.items()}
    with plan.applied(model) as layers, torch.no_grad(), ExitStack() as stack:
        for site, layer in layers.items():
            if isinstance(layer, SparseLinear):
                weight = layer.linear.weight

                def see(module: nn.Module, args: Any, site: Any = site, size: int = weight.numel()) -> None:
                    x = args[0].reshape(ids.numel(), -1)[1:]
                    count.unread += float(rests(x, threshold[site]).sum()) * size

                stack.callback(layer.register_forward_pre_hook(see).remove)
        for block, module in enumerate(blocks):
            for experts in (m for m in module.modules() if isinstance(m, SparseExperts)):

                def route(module: nn.Module, args: Any, block: int = block) -> None:
                    _count_experts(count, module.experts, block, threshold, *args)

                stack.callback(experts.register_forward_pre_hook(route).remove)
        model(ids)
    return count


def _count_experts(
    count: Count, module: Any, block: int, threshold: dict, hidden: Tensor, chosen: Tensor, weights: Tensor
) -> None:
    """Goes through the chosen experts of each token, one by one."""
    gated = hasattr(module, "gate_up_proj")
    first = module.gate_up_proj if gated else module.up_proj
    turned = bool(getattr(module, "is_transposed", False))
    for token in range(1, len(hidden)):
        for expert in (e for e in chosen[token].tolist() if e < module.num_experts):
            count.routed += count.expert[block]
            part = f"expert{expert}"
            into = [first[expert], module.down_proj[expert]]
            into = [w.t() if turned else w for w in into]
            biases = [getattr(module, f"{n}_bias", None) for n in ("gate_up_proj" if gated else "up_proj", "down_proj")]
            x = hidden[token]
            t = threshold[block, "gate_up" if gated else "up", part]
            y = into[0] @ torch.where(x.abs() > t, x, 0.0)
            y = y if biases[0] is None else y + biases[0][expert]
            y = module._apply_gate(y) if gated else module.act_fn(y)
            count.unread += float(rests(x, t)) * into[0].numel()
            count.unread += float(rests(y, threshold[block, "down", part])) * into[1].numel()
