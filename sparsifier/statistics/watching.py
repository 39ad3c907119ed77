"""Runs the dense model over calibration text and shows what its sites see."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.calibration import Calibration
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.layers import StandIn, Tokens
from resting.sparsifier.logits import final_hidden
from resting.sparsifier.policy import Selection
from resting.sparsifier.progress import OnProgress, silent
from resting.sparsifier.roles import ACT
from resting.sparsifier.routed_tokens import tokens_by_site
from resting.sparsifier.sites import Site
from resting.sparsifier.sparse_experts import WatchedExperts
from resting.sparsifier.token_tracker import TokenTracker

See = Callable[[Site, Tensor], None]


@torch.no_grad()
def run_watched(
    model: nn.Module,
    calibration: Calibration,
    sites: Iterable[Site],
    see: See,
    stage: str = "statistics",
    on_progress: OnProgress = silent,
    outputs: Iterable[Site] = (),
    see_output: See | None = None,
) -> None:
    """Runs `model` over the statistics windows and shows `see` the sparse tokens' tensor at each of `sites`.

    At a linear site it is the input, at `ACT` the output of the activation; shape [tokens, channels]. `see_output` is
    shown the output of the matrices at `outputs`, of a fused one the part that is no gate, before the input of any
    later layer is shown.
    """
    total = min(calibration.statistics_windows, len(calibration.windows))
    device = next(model.parameters()).device
    decoder = Decoder.of(model)
    tracker = TokenTracker(calibration.statistics_policy_for(calibration.windows))

    def before(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        tokens = tokens_at(site)
        return lambda module, args: see(site, tokens.selection.take(args[0]))

    def after(site: Site, see: See) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        tokens = tokens_at(site)

        def show(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            found = tokens.selection.take(output)
            see(site, found.chunk(2, -1)[1] if site.role == "gate_up" else found)

        return show

    done = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.callback(tracker.watch(decoder.trunk).remove)
        sites, outputs = list(sites), list(outputs)
        tokens_at = tokens_by_site(decoder, tracker, stack)
        for block in {site.block for site in (*sites, *outputs) if decoder.in_one_tensor(site)}:
            stack.enter_context(watched_experts(decoder, block, tracker, set(sites), see, set(outputs), see_output))
        for site in sites:
            if decoder.in_one_tensor(site):
                continue
            slot = decoder.slots[site]
            if site.role == ACT:  # no hook: one activation may serve several sites
                stack.callback(slot.put, slot.module)
                watched = WatchedActivation(slot.module, site, tokens_at(site), see)
                slot.put(watched.train(slot.module.training))
            else:
                stack.callback(slot.module.register_forward_pre_hook(before(site)).remove)
        if see_output is not None:
            for site in outputs:
                if not decoder.in_one_tensor(site):
                    stack.callback(decoder.linear(site).register_forward_hook(after(site, see_output)).remove)
        for ids, mask in calibration.statistics_batches():
            final_hidden(model, ids.to(device), None if mask is None else mask.to(device))
            done += len(ids)
            on_progress(stage, done, total, "windows")


class WatchedActivation(StandIn):
    """Runs an activation and shows its output."""

    stands_for = "activation"

    def __init__(self, activation: nn.Module, site: Site, tokens: Tokens, see: See) -> None:
        super().__init__()
        self.activation = activation
        self._site, self._tokens, self._see = site, tokens, see

    def forward(self, x: Tensor) -> Tensor:
        y = self.activation(x)
        self._see(self._site, self._tokens.selection.take(y))
        return y


@contextmanager
def watched_experts(
    decoder: Decoder,
    block: int,
    tracker: TokenTracker,
    sites: set[Site],
    see: See,
    outputs: set[Site],
    see_output: See | None,
) -> Iterator[None]:
    """Shows what the experts of one block read and give, inside the ``with`` block."""
    experts = decoder.found[block].experts
    assert experts is not None

    def read(site: Site, x: Tensor, selection: Selection) -> None:
        if site in sites:
            see(site, selection.take(x))

    def give(site: Site, y: Tensor, selection: Selection) -> None:
        if site in outputs and see_output is not None:
            see_output(site, selection.take(y))

    slot = decoder.slot_of_experts(block)
    watched = WatchedExperts(experts, block, tracker, read, give)
    slot.put(watched.train(experts.module.training))
    try:
        yield
    finally:
        slot.put(experts.module)
