"""Gathers what methods may know of the neurons of a dense model, in passes over the calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import DivergedError, SparsifierError
from resting.sparsifier.neurons.sequence import token_shares
from resting.sparsifier.roles import ACT, NEURONS
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import Histogram, Moments, run_watched


@dataclass
class NeuronStatistics:
    """Holds the statistics of the neurons of one MLP.

    Attributes
    ----------
    up : Histogram
        Counts |u|.
    gate, product : Moments
        Sum up the activated gate, and z, neuron by neuron.
    shares : Tensor [neurons]
        Sums up ``z_tj^2 / ||z_t||^2`` in fp64: the squared statistic of GRIFFIN over the whole text.
    """

    up: Histogram = field(default_factory=Histogram)
    gate: Moments = field(default_factory=Moments)
    product: Moments = field(default_factory=Moments)
    shares: Tensor = field(default_factory=lambda: torch.zeros(()))


def last_of_up(decoder: Decoder, site: Site) -> Site:
    """Gives the site of the matrix that computes up in the MLP of `site`: up, or gate and up in one."""
    return next(s for role in ("up", "gate_up") if (s := site._replace(role=role)) in decoder.slots)


def first_of_gate(decoder: Decoder, site: Site) -> Site:
    """Gives the site of the matrix that computes the gate in the MLP of `site`."""
    return next(s for role in ("gate", "gate_up") if (s := site._replace(role=role)) in decoder.slots)


def down_norms(decoder: Decoder, site: Site) -> Tensor:
    """Computes ||W_down,:j||_2, [neurons] in fp32 on the CPU: what a neuron can do to the output."""
    norms = decoder.projection(site._replace(role="down")).weight.detach().float().norm(dim=0).cpu()
    if not bool(torch.isfinite(norms).all()):
        raise DivergedError(f"the column norms of down at {site} are NaN, or beyond the range of float32")
    return norms


def neuron_statistics(calibrated: CalibratedModel) -> dict[Site, NeuronStatistics]:
    """Gathers `NeuronStatistics` of every gated MLP in one pass, once for `calibrated`."""
    key = f"neurons {calibrated.calibration.statistics_policy}"
    if key not in calibrated.cached:
        calibrated.cached[key] = _gather(calibrated)
    return calibrated.cached[key]


def _gather(calibrated: CalibratedModel) -> dict[Site, NeuronStatistics]:
    decoder = calibrated.decoder
    found = {site: NeuronStatistics() for site in decoder.neuron_sites()}

    def see(at: Site, x: Tensor) -> None:
        site = at._replace(role=NEURONS)
        if at.role == ACT:
            found[site].gate.add(x)
        else:
            found[site].product.add(x)
            found[site].shares = found[site].shares + token_shares(x).sum(0, dtype=torch.float64).cpu()

    def see_up(at: Site, u: Tensor) -> None:
        found[at._replace(role=NEURONS)].up.add(u)

    sites = [site._replace(role=role) for site in found for role in (ACT, "down")]
    outputs = [last_of_up(decoder, site) for site in found]
    run_watched(
        calibrated.model, calibrated.calibration, sites, see, "neurons", calibrated.on_progress, outputs, see_up
    )
    return found


def up_scores(calibrated: CalibratedModel, scales: Mapping[Site, Tensor], name: str) -> dict[Site, Histogram]:
    """Counts ``scale * |u|`` of every gated MLP in one pass, once for `calibrated` and `name`."""
    key = f"neurons {name} {calibrated.calibration.statistics_policy}"
    if key not in calibrated.cached:
        found = {site: Histogram() for site in scales}

        def see_up(at: Site, u: Tensor) -> None:
            site = at._replace(role=NEURONS)
            found[site].add(u.abs() * scales[site].to(u.device))

        outputs = [last_of_up(calibrated.decoder, site) for site in scales]
        run_watched(
            calibrated.model,
            calibrated.calibration,
            [],
            lambda site, x: None,
            name,
            calibrated.on_progress,
            outputs,
            see_up,
        )
        calibrated.cached[key] = found
    return calibrated.cached[key]


@dataclass
class NeuronTokens:
    """Holds the inputs and the products of one MLP for single tokens.

    Attributes
    ----------
    x : Tensor [tokens, hidden]
        As the model computes it, on the CPU.
    z : Tensor [tokens, neurons]
    """

    x: Tensor
    z: Tensor


def neuron_tokens(calibrated: CalibratedModel, tokens: int) -> dict[Site, NeuronTokens]:
    """Keeps `tokens` tokens, spread evenly over the statistics windows, of every gated MLP.

    For methods that look at patterns of single tokens: 4,096 of them are 4.8 GB in the shape of Llama-3-8B.

    Raises
    ------
    SparsifierError
        If there are no tokens.
    """
    calibration, decoder = calibrated.calibration, calibrated.decoder
    key = f"neuron tokens {tokens} {calibration.statistics_policy}"
    if key in calibrated.cached:
        return calibrated.cached[key]
    windows = min(calibration.statistics_windows, len(calibration.windows))
    whole = windows * calibration.windows.shape[1]
    step = max(1.0, whole / max(1, tokens))
    parts: dict[Site, list[Tensor]] = {}
    passed: dict[Site, int] = {}

    def see(at: Site, x: Tensor) -> None:
        before = passed.get(at, 0)
        passed[at] = before + len(x)
        wanted = torch.arange(int(before / step), int((before + len(x)) / step) + 1).double().mul(step).ceil().long()
        chosen = wanted[(wanted >= before) & (wanted < passed[at])] - before
        parts.setdefault(at, []).append(x[chosen.to(x.device)].detach().cpu())

    sites = decoder.neuron_sites()
    reads = [first_of_gate(decoder, site) for site in sites] + [site._replace(role="down") for site in sites]
    run_watched(calibrated.model, calibration, reads, see, "neurons of tokens", calibrated.on_progress)
    found = {
        site: NeuronTokens(
            torch.cat(parts[first_of_gate(decoder, site)])[:tokens],
            torch.cat(parts[site._replace(role="down")])[:tokens],
        )
        for site in sites
    }
    if not all(len(kept.z) for kept in found.values()):
        raise SparsifierError("the calibration text has no token to take neurons of")
    calibrated.cached[key] = found
    return found
