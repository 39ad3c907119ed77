"""Defines the module that stands in for down under a neuron mask, and puts it there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import PlanError
from resting.sparsifier.layers import StandIn
from resting.sparsifier.meter import Meter
from resting.sparsifier.neurons.mask import NeuronMask, Seen, is_kept
from resting.sparsifier.neurons.sequence import PromptState
from resting.sparsifier.roles import ACT
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker


class NeuronDown(StandIn):
    """Sets the resting neurons of the input of down to zero; dense tokens pass as they are.

    Attributes
    ----------
    down : nn.Module
        The layer, or what stands in for it already.
    """

    stands_for = "down"

    def __init__(
        self,
        down: Any,
        site: Site,
        mask: NeuronMask,
        tokens: TokenTracker,
        held: Mapping[str, Any],
        meter: Meter | None,
    ) -> None:
        super().__init__()
        self.down, self.site, self.mask, self.tokens, self.meter = down, site, mask, tokens, meter
        self.u: Tensor | None = None
        self.x: Tensor | None = None
        self._held = dict(held)
        self._act = self._held.pop("act")
        self._scale: Tensor | None = self._held.pop("scale")
        self._of_sequence: tuple[int, Tensor] | None = None
        self._prompt = PromptState(site, self._scale) if mask.known.asks_for_prompt else None

    def forward(self, z: Tensor) -> Tensor:
        selection = self.tokens.selection
        keep = self._kept(z)
        self.u = self.x = None
        if keep is None:
            return self.down(z)
        if self.meter is not None and selection.counted:
            self.meter.record_neurons(self.site, keep.expand(z.shape), selection)
        return self.down(selection.restore_dense(torch.where(keep, z, z.new_zeros(())), z))

    @torch.no_grad()
    def of_sequence(self) -> tuple[int, Tensor]:
        """Tells which neurons the one sequence that decodes keeps, [neurons] of bool, and a number of that mask.

        For kernels, which compute a decoded token without calling this module: its state moves on.
        """
        if self._prompt is None:
            if self._of_sequence is None:
                self._of_sequence = (0, self._keep_of(None))
            return self._of_sequence
        statistic = self._prompt.step(self.tokens.selection, self.tokens.sequence)
        if self._of_sequence is None or self._of_sequence[0] != self._prompt.version:
            self._of_sequence = (self._prompt.version, self._keep_of(statistic))
        return self._of_sequence

    def _keep_of(self, prompt: Tensor | None) -> Tensor:
        z = torch.empty(0, device=next(self.parameters()).device)
        return is_kept(self.mask, Seen(z, None, None, prompt, self._scale, self._held, self._act)).flatten()

    @torch.no_grad()
    def _kept(self, z: Tensor) -> Tensor | None:
        """Tells which neurons are kept, as `z` is shaped; None where no token is sparse."""
        selection, prompt = self.tokens.selection, None
        if self._prompt is not None:
            prompt = self._prompt.statistic(selection.by_token(z), selection, self.tokens.sequence)
        if selection.shape is not None and not selection.tokens:
            return None
        keep = is_kept(self.mask, Seen(z, self.u, self.x, prompt, self._scale, self._held, self._act))
        return keep if prompt is None or z.dim() == 3 else keep.expand(*selection.by_token(z).shape).reshape(z.shape)


def install_neurons(
    decoder: Decoder, masks: Mapping[Site, NeuronMask], tokens: TokenTracker, meter: Meter | None, stack: ExitStack
) -> None:
    """Puts a `NeuronDown` before whatever computes down at the sites of `masks`, until `stack` closes."""
    for site, mask in masks.items():
        slots = {role: decoder.slots.get(site._replace(role=role)) for role in ("gate", "up", "gate_up", "down")}
        slot = slots["down"]
        assert slot is not None
        layer = NeuronDown(slot.module, site, mask, tokens, _held(decoder, site, mask), meter)
        if "u" in mask.known.sees:
            last = slots["up"] or slots["gate_up"]
            assert last is not None
            stack.callback(last.module.register_forward_hook(_see_u(layer, slots["up"] is None)).remove)
        if "x" in mask.known.sees:
            first = slots["gate"] or slots["gate_up"]
            assert first is not None
            stack.callback(first.module.register_forward_pre_hook(_see_x(layer)).remove)
        stack.callback(slot.put, slot.module)
        slot.put(layer.train(slot.module.training))


def _see_u(layer: NeuronDown, is_fused: bool) -> Any:
    def see(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        layer.u = output.chunk(2, -1)[1] if is_fused else output

    return see


def _see_x(layer: NeuronDown) -> Any:
    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        layer.x = args[0]

    return see


@torch.no_grad()
def _held(decoder: Decoder, site: Site, mask: NeuronMask) -> dict[str, Any]:
    """Gathers what a score may need, on the device of the weights: tensors, scale and activation."""
    down = decoder.projection(site._replace(role="down")).weight
    held: dict[str, Any] = {name: tensor.to(down.device) for name, tensor in mask.tensors.items()}
    if mask.known.prepare is not None:
        weights, biases = decoder.gate_and_up(site)
        held |= mask.known.prepare(mask, *weights, *biases)
    act = decoder.slots[site._replace(role=ACT)].module
    return held | {"scale": None if mask.scale is None else mask.scale.to(down.device), "act": act}


def check_masks(masks: Mapping[Site, NeuronMask], rules: Mapping[Site, Any], decoder: Decoder) -> None:
    """Refuses neuron masks that do not fit a model, or stand beside a rule at the activated gate of the same MLP.

    Raises
    ------
    PlanError
    UnsupportedModelError
        If the model has no gated MLP whose neurons can rest.
    """
    known = decoder.neuron_sites() if masks else []
    for site, mask in masks.items():
        if site not in known:
            raise PlanError(f"the plan has a neuron mask at {site}, where this model has no gated MLP")
        if (act := site._replace(role=ACT)) in rules:
            raise PlanError(f"a plan has a rule at {act} or a neuron mask at {site}, not both")
        mask.check_shapes(str(site), *decoder.mlp_shape(site))
