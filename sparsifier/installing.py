"""Puts sparse layers in the place of dense ones, and takes them out again."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.layers import SharedInput, SparseActivation, SparseLinear, SparseProduct
from resting.sparsifier.meter import Meter
from resting.sparsifier.neurons.down import install_neurons
from resting.sparsifier.neurons.mask import NeuronMask
from resting.sparsifier.roles import ACT, INPUT_OF
from resting.sparsifier.routed_tokens import OneExpert, tokens_by_site
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site, Slot
from resting.sparsifier.sparse_experts import SparseExperts
from resting.sparsifier.token_tracker import TokenTracker

DENSE = Rule()


@contextmanager
def installed(
    decoder: Decoder,
    rules: Mapping[Site, Rule],
    tracker: TokenTracker,
    meter: Meter | None = None,
    neurons: Mapping[Site, NeuronMask] | None = None,
) -> Iterator[dict[Site, SparseProduct | SparseActivation | SharedInput]]:
    """Puts sparse layers in the place of dense ones inside the ``with`` block.

    Yields
    ------
    dict of Site to SparseProduct
        `SparseLinear`, or an expert's product; at `ACT` a `SparseActivation`, or an expert's `SharedInput`.
    """
    layers: dict[Site, SparseProduct | SparseActivation | SharedInput] = {}
    shared: dict[tuple[int, str, str], list[SharedInput]] = defaultdict(list)

    def reader(site: Site, rule: Rule) -> SharedInput:
        group = shared[site.block, site.part, INPUT_OF[site.role]]
        for found in group:
            if found.same_mask(rule):
                break
        else:
            found = SharedInput(rule, meter)
            group.append(found)
        found.readers += 1
        return found

    with ExitStack() as stack:
        tokens_at = tokens_by_site(decoder, tracker, stack)
        modules: dict[Slot, nn.Module] = {}
        for site, rule in rules.items():
            slot = decoder.slots[site]
            if decoder.in_one_tensor(site):
                continue
            tokens = tokens_at(site)
            layer = (
                SparseActivation(slot.module, site, tokens, SharedInput(rule, meter, readers=1))
                if site.role == ACT
                else SparseLinear(slot.module, site, rule, tokens, reader(site, rule))
            )
            layers[site] = modules[slot] = layer
        for block, found in enumerate(decoder.found):
            if found.experts is not None and (meter is not None or _has_rule(block, rules)):
                slot = decoder.slot_of_experts(block)
                experts = SparseExperts(found.experts, block, tracker, rules, meter).train(slot.module.training)
                layers.update(experts.products)
                layers.update(experts.acts)
                modules[slot] = experts
        if meter is not None:
            stack.callback(_counting_tokens(decoder, tracker, meter).remove)
            layer_sites = [site for site in decoder.sites() if not decoder.in_one_tensor(site)]
            meter.expect([site for site in layer_sites if not site.is_expert])
            for site in layer_sites:
                if site not in rules:
                    hook = _looking(site, reader(site, DENSE), tokens_at(site))
                    stack.callback(decoder.linear(site).register_forward_pre_hook(hook).remove)
        stack.callback(_hang, {slot: slot.module for slot in modules})
        _hang(modules)
        install_neurons(decoder, neurons or {}, tracker, meter, stack)  # outside of what stands in for down
        yield {site: layers[site] for site in rules}


def _hang(modules: Mapping[Slot, nn.Module]) -> None:
    for slot, module in modules.items():
        slot.put(module)


def _has_rule(block: int, rules: Mapping[Site, Rule]) -> bool:
    return any(site.block == block and site.is_expert for site in rules)


def _looking(
    site: Site, shared: SharedInput, tokens: TokenTracker | OneExpert
) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """Makes a hook that shows the input of a dense layer to the meter."""

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        shared.read(args[0], site, tokens.selection)

    return look


def _counting_tokens(decoder: Decoder, tracker: TokenTracker, meter: Meter) -> RemovableHandle:
    """Makes a hook that tells the meter of the sparse tokens of every forward."""

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        selection = tracker.selection
        if selection.counted:
            meter.count_tokens(selection.tokens)

    return decoder.layers[0].register_forward_pre_hook(count)
