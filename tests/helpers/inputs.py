"""What layers read, of the dense model and under a plan."""

from __future__ import annotations

import torch

from resting.sparsifier import (
    Decoder,
    run_watched,
)


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def inputs_of(model, calibration, sites):
    """The dense model's inputs [tokens, in] of the sparse calibration tokens."""
    seen = {}
    run_watched(model, calibration, sites, lambda site, x: seen.setdefault(site, []).append(x.clone()))
    return {site: torch.cat(parts) for site, parts in seen.items()}


def inputs_under(plan, model, windows, site):
    """The inputs [tokens, in] of all tokens but the first of `windows` at `site`, a layer that `plan` leaves dense."""
    seen, linear = [], Decoder.of(model).linear(site)
    with plan.applied(model), torch.no_grad():
        hook = linear.register_forward_pre_hook(lambda m, a: seen.append(a[0][:, 1:]))
        model(windows)
        hook.remove()
    return torch.cat(seen).flatten(0, 1)
