"""Decodes an MLP whose activated gate is masked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.break_even import threads_for
from resting.sparsifier.decoding.contract import weight_of
from resting.sparsifier.decoding.products import rows
from resting.sparsifier.decoding.stand_in import DecodeStandIn, start_of
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.layers import SparseActivation, SparseLinear
from resting.sparsifier.masking import Masking
from resting.sparsifier.projection import Projection
from resting.sparsifier.roles import ACT, MLP
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker


class DecodeMLP(DecodeStandIn):
    r"""Runs an MLP whose activated gate is masked: resting rows of ``up`` and columns of ``down`` are not read.

    .. math:: y = W_{down} (a \odot W_{up} x), \qquad a = \sigma(W_{gate} x) \odot [|\sigma(W_{gate} x)| > t]

    Parameters
    ----------
    mlp : nn.Module
        The module it stands for, called as it is for anything but one sparse token.
    tokens : TokenTracker
    threads : int
    layers : dict of str to nn.Module
        Those of the plan, by role: gate and up, or both in one, down and the activation.
    """

    stands_for = "mlp"

    def __init__(self, mlp: nn.Module, tokens: TokenTracker, threads: int, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.mlp, self.down, self._tokens = mlp, layers["down"], tokens
        activation, up = layers[ACT], layers["gate_up" if "gate_up" in layers else "up"]
        assert isinstance(activation, SparseActivation)
        self.activation = activation.activation
        linear = up.linear if isinstance(up, SparseLinear) else up
        rule = up.rule if isinstance(up, SparseLinear) else Rule()
        if rule.low_rank is not None:
            raise SparsifierError("a low-rank part at up, whose rows rest under an act mask, has no decode kernel")
        self._masking = None if rule.masks_nothing else Masking(rule)
        matrix = Projection.of(linear)
        weight, bias = weight_of(matrix, rule), start_of(matrix, rule)
        if "gate" in layers:
            self.gate = layers["gate"]
        else:  # one matrix, the gate first
            half = weight.shape[0] // 2
            gate_bias, bias = (None, None) if bias is None else bias.split(half)
            self._gate = partial(
                F.linear, weight=weight[:half], bias=None if gate_bias is None else gate_bias.to(weight)
            )
            weight = weight[half:]
        self._rows = rows(weight, activation.shared.rule, bias, threads_for(weight, threads))

    def forward(self, x: Tensor) -> Tensor:
        if not self._tokens.is_decoding:
            return self.mlp(x)
        kept = x if self._masking is None else self._masking(x)
        gate = self.gate(x) if hasattr(self, "gate") else self._gate(kept)
        return self.down(self._rows(kept, self.activation(gate)))


@torch.no_grad()
def can_gate(decoder: Decoder, act: Site) -> bool:
    """Tells whether the MLP at `act` computes ``down(act(gate) * up)`` and no more, so that `DecodeMLP` can."""
    if act.is_expert or not any(act._replace(role=role) in decoder.slots for role in ("gate", "gate_up")):
        return False
    found = {
        role: decoder.slots[act._replace(role=role)] for role in (*MLP, ACT) if act._replace(role=role) in decoder.slots
    }
    mlp, layers = found["down"].parent, {role: slot.module for role, slot in found.items()}
    weight = Projection.of(layers["down"]).weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 1, weight.shape[0], generator=generator).to(weight)
    both = layers["gate_up"](x).chunk(2, -1) if "gate_up" in layers else (layers["gate"](x), layers["up"](x))
    wanted = layers["down"](layers[ACT](both[0]) * both[1])
    try:
        given = mlp(x)
    except Exception:  # it wants more than hidden states
        return False
    rounding = max(1e-5, 16 * torch.finfo(weight.dtype).eps) * float(wanted.abs().max())
    return given.shape == wanted.shape and torch.allclose(given, wanted, rtol=0.0, atol=rounding)
