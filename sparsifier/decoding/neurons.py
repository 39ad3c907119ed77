"""Decodes under neuron masks that stay for a whole sequence: by narrower matrices, made once for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.gated import can_gate
from resting.sparsifier.decoding.stand_in import DecodeStandIn
from resting.sparsifier.decoding.step.following import is_known
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.installing import installed
from resting.sparsifier.neurons.down import NeuronDown
from resting.sparsifier.plan import Plan
from resting.sparsifier.roles import ACT
from resting.sparsifier.sites import Site, Slot
from resting.sparsifier.token_tracker import TokenTracker


class DecodeNeurons(DecodeStandIn):
    r"""Runs a gated MLP by the rows and columns of the neurons that its sequence keeps.

    .. math:: y = W_{down,:K} \, (a(W_{gate,K} x) \odot W_{up,K} x)

    They are copied, side by side, when a sequence begins to decode, and are read for every token of it.

    Parameters
    ----------
    mlp : nn.Module
        The module it stands for, called as it is for anything but one sparse token.
    masked : NeuronDown
        The definition, which knows the mask.
    decoder : Decoder
    tokens : TokenTracker
    act : nn.Module
        The activation of the gate.
    """

    stands_for = "mlp"

    def __init__(
        self, mlp: nn.Module, masked: NeuronDown, decoder: Decoder, tokens: TokenTracker, act: nn.Module
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self._masked, self._tokens, self._act = [masked], tokens, act  # in a list: it is a module of the mlp already
        self._decoder = decoder
        self._version = -1
        self._kept: tuple[tuple[Tensor, Tensor | None], ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        if not self._tokens.is_decoding:
            return self.mlp(x)
        version, keep = self._masked[0].of_sequence()
        if version != self._version:
            self._gather(keep.nonzero()[:, 0])
            self._version = version
        gate, up, down = self._kept
        return F.linear(self._act(F.linear(x, *gate)) * F.linear(x, *up), *down)

    @torch.no_grad()
    def _gather(self, kept: Tensor) -> None:
        site = self._masked[0].site
        weights, biases = self._decoder.gate_and_up(site)
        down = self._decoder.projection(site._replace(role="down"))
        rows = [(w[kept].contiguous(), None if b is None else b[kept]) for w, b in zip(weights, biases)]
        self._kept = (*rows, (down.weight[:, kept].contiguous(), down.bias))


def check_scores(plan: Plan, by_step: bool) -> None:
    """Refuses neuron masks that change from token to token, but for those that a step on a CPU computes.

    Raises
    ------
    SparsifierError
    """
    for mask in plan.neurons.values():
        if mask.known.by_token and not (by_step and is_known(mask)):
            raise SparsifierError(
                f"{plan.method} chooses neurons anew for every token, by {mask.score!r}, for which there is no decode "
                "kernel here; allowed: masks that stay for a sequence, on a CPU where blocks have a known form also a "
                "threshold on the output of up or a codebook with a head, and Plan.applied for others"
            )


@contextmanager
def decoding_neurons(plan: Plan, decoder: Decoder, tracker: TokenTracker) -> Iterator[None]:
    """Makes the gated MLPs decode by what they keep, inside the ``with`` block; all else runs as in the dense model.

    Raises
    ------
    SparsifierError
        If a mask changes from token to token, if the plan has rules beside its masks, or if an MLP computes more than
        ``down(act(gate) * up)``.
    """
    check_scores(plan, by_step=False)
    for site in plan.neurons:
        if not can_gate(decoder, site._replace(role=ACT)):
            raise SparsifierError(f"the MLP at {site} computes more than gate, up and down: it has no decode form")
    if plan.rules:
        raise SparsifierError(
            f"{plan.method} has rules beside neuron masks, for which there is no decode kernel: use Plan.applied"
        )
    with ExitStack() as stack:
        stack.enter_context(installed(decoder, {}, tracker, neurons=plan.neurons))
        for site in plan.neurons:
            slot = decoder.slots[site._replace(role="down")]
            masked, mlp = slot.module, slot.parent
            assert isinstance(masked, NeuronDown)
            held = _slot_of(decoder, site, mlp)
            act = decoder.slots[site._replace(role=ACT)].module
            stack.callback(setattr, held.parent, held.attribute, mlp)
            setattr(held.parent, held.attribute, DecodeNeurons(mlp, masked, decoder, tracker, act))
        yield


def _slot_of(decoder: Decoder, site: Site, mlp: nn.Module) -> Slot:
    layer = decoder.layers[site.block]
    return next(Slot(m, name) for m in layer.modules() for name, child in m.named_children() if child is mlp)
