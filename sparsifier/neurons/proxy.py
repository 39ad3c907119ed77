"""Scores neurons by copies of gate and up in few bits, read with part of the input."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from resting.sparsifier.errors import PlanError
from resting.sparsifier.masking import largest
from resting.sparsifier.neurons.mask import NeuronMask, Seen

GROUP = 128
"""Weights along the inputs that share one scale."""
FULL = 16
"""Bits from which on the copy is the weights themselves."""


def rounded(weight: Tensor, bits: int, group: int = GROUP) -> Tensor:
    r"""Rounds `weight` [out, in] to the nearest of ``2^bits`` levels of its group.

    .. math:: W^ = \Delta (\mathrm{clip}(\lfloor W / \Delta \rfloor, -2^{b-1}, 2^{b-1} - 1) + 1/2), \qquad
        \Delta = \max_{group} |W| / 2^{b-1}

    Levels lie symmetrically around 0 and none is 0, since at two bits the least and the largest weight of a group are
    outliers that would own half of the levels of a grid between them. One bit gives the sign times half of the
    largest magnitude. From `FULL` bits on the weights are read as they are.

    Returns
    -------
    Tensor [out, in]
    """
    if bits >= FULL:
        return weight
    out, inputs = weight.shape
    padded = torch.nn.functional.pad(weight.float(), (0, -inputs % group)).view(out, -1, group)
    half = 2.0 ** (bits - 1)
    step = padded.abs().amax(-1, keepdim=True).half().float() / half  # scales are kept in 16 bits
    codes = (padded / step.clamp_min(torch.finfo(torch.float32).tiny)).floor().clamp(-half, half - 1)
    return ((codes + 0.5) * step).view(out, -1)[:, :inputs].to(weight.dtype)


def rounded_copies(
    mask: NeuronMask, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None
) -> dict[str, Tensor]:
    """Makes the copies from the model's own weights: they are no part of a plan, which names those weights."""
    bits = int(mask.options["bits"])
    found = {"gate": rounded(gate, bits), "up": rounded(up, bits)}
    biases = {"gate_bias": gate_bias, "up_bias": up_bias}
    return found | {name: bias for name, bias in biases.items() if bias is not None}


def proxy_score(mask: NeuronMask, seen: Seen) -> Tensor:
    """Gives ``|a(W_g^ x^) (W_u^ x^)|``, weighed by the scale, with x^ the largest entries of x."""
    assert seen.x is not None
    assert seen.act is not None
    x = largest(seen.x, read_inputs(mask, seen.x.shape[-1]))
    linear, held = torch.nn.functional.linear, seen.tensors
    gate = linear(x, held["gate"], held.get("gate_bias"))
    score = (seen.act(gate) * linear(x, held["up"], held.get("up_bias"))).abs()
    return score if seen.scale is None else score * seen.scale


def read_inputs(mask: NeuronMask, hidden: int) -> int:
    """Counts the inputs that the copies are read with."""
    return round((1.0 - float(mask.options["rests"])) * hidden)


def proxy_elements(mask: NeuronMask, hidden: int, neurons: int) -> float:
    """Counts codes of the kept inputs and all scales: every group has a kept input, in all likelihood."""
    bits = int(mask.options["bits"])
    codes = 2 * read_inputs(mask, hidden) * neurons * min(bits, FULL) / 16
    return codes + (0 if bits >= FULL else 2 * neurons * math.ceil(hidden / GROUP))


def checked_proxy(mask: NeuronMask) -> None:
    """Refuses options that are none."""
    bits, rests = mask.options.get("bits"), mask.options.get("rests")
    if not isinstance(bits, int) or not 1 <= bits <= FULL:
        raise PlanError(f"a proxy has 1 to {FULL} bits, got {bits!r}")
    if isinstance(rests, str) or rests is None or not 0.0 <= rests < 1.0:
        raise PlanError(f"the share of a proxy's inputs that rests must be in [0, 1), got {rests!r}")
