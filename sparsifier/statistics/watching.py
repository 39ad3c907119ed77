"""Runs the dense model over calibration text and shows what its sites see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.calibration import Calibration
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.logits import final_hidden
from resting.sparsifier.progress import OnProgress, silent
from resting.sparsifier.sites import ACT, Decoder, Site
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
    shown the output of the linear layers at `outputs`, before the input of any later layer is shown.
    """
    total = min(calibration.statistics_windows, len(calibration.windows))
    device = next(model.parameters()).device
    decoder = Decoder.of(model)
    tracker = TokenTracker(calibration.statistics_policy_for(calibration.windows))

    def before(site: Site) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, args: see(site, tracker.selection.take(args[0]))

    def after(site: Site, see: See) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        return lambda module, args, output: see(site, tracker.selection.take(output))

    done = 0
    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        stack.callback(tracker.watch(decoder.trunk).remove)
        for site in sites:
            module = decoder.slots[site].module
            hook = (
                module.register_forward_hook(after(site, see))
                if site.role == ACT
                else module.register_forward_pre_hook(before(site))
            )
            stack.callback(hook.remove)
        if see_output is not None:
            for site in outputs:
                stack.callback(decoder.linear(site).register_forward_hook(after(site, see_output)).remove)
        for ids, mask in calibration.statistics_batches():
            final_hidden(model, ids.to(device), None if mask is None else mask.to(device))
            done += len(ids)
            on_progress(stage, done, total, "windows")
