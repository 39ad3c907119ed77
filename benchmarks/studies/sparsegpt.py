"""Implements SparseGPT (arXiv 2301.00774): prunes weights of a layer, and moves the others to make up for it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.sparsifier import LINEAR_ROLES, Decoder, DivergedError, Site
from resting.sparsifier.roles import INPUT_OF
from resting.sparsifier.statistics import run_watched

DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it."""
COLUMNS = 128
"""Columns whose masks are chosen together."""


def sparsegpt(weight: Tensor, hessian: Tensor, share: float, columns: int = COLUMNS) -> Tensor:
    r"""Prune a `share` of `weight` so that the layer's outputs change little.

    Columns are gone through once, from the first to the last, in blocks. In every block the weights with the least

    .. math:: w_{ij}^2 / [H^{-1}]_{jj}^2

    are removed, with the inverse of the Hessian over the columns not gone through yet (its diagonal is the squared one
    of the upper Cholesky factor); what a removed weight leaves undone is made up by the columns to its right (optimal
    brain surgeon).

    Parameters
    ----------
    weight : Tensor [out, in]
    hessian : Tensor [in, in]
        ``X^T X`` over calibration tokens, up to a factor.
    share : float
        Of the weights of every block of columns, and so of all.
    columns : int
        Of a block.

    Returns
    -------
    Tensor [out, in]
        In the dtype of `weight`; exactly ``round(share * entries)`` of a block of columns are zero.

    Raises
    ------
    DivergedError
        If the Hessian is not finite.
    """
    w = weight.double().clone() if weight.dtype == torch.float64 else weight.float().clone()
    upper, dead = inverse_factor(hessian.to(w.device))
    upper = upper.to(w.dtype)
    w[:, dead] = 0.0  # what multiplies nothing costs nothing
    kept = torch.ones_like(w, dtype=torch.bool)
    for start in range(0, w.shape[1], columns):
        stop = min(start + columns, w.shape[1])
        block, errors = w[:, start:stop], torch.zeros_like(w[:, start:stop])
        diagonal = upper.diagonal()[start:stop]
        scores = block.square() / diagonal.square()
        count = round(share * scores.numel())
        gone = torch.zeros(scores.numel(), dtype=torch.bool, device=w.device)
        gone[scores.flatten().topk(count, largest=False, sorted=False).indices] = True
        gone = gone.view_as(scores)
        kept[:, start:stop] = ~gone
        for i in range(stop - start):
            column = block[:, i]
            errors[:, i] = torch.where(gone[:, i], column, 0.0) / diagonal[i]
            block[:, i:] -= errors[:, i : i + 1] * upper[start + i, start + i : stop]
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return torch.where(kept, w, 0.0).to(weight.dtype)


def inverse_factor(hessian: Tensor) -> tuple[Tensor, Tensor]:
    """Compute U, upper triangular in fp64, with ``U^T U`` the inverse of the damped Hessian.

    Returns
    -------
    upper : Tensor [in, in]
    dead : Tensor [in] of bool
        Channels that are zero on every token.

    Raises
    ------
    DivergedError
    """
    h = hessian.double().clone()
    if not bool(torch.isfinite(h).all()):
        raise DivergedError("the second moments of a layer's inputs are NaN or infinite")
    dead = h.diagonal() == 0
    h.diagonal()[dead] = 1.0
    h.diagonal().add_(DAMPING * h.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    return torch.linalg.cholesky(inverse, upper=True), dead


@contextmanager
def pruned_in_turn(loaded: LoadedModel, decoder: Decoder, share: float) -> Iterator[None]:
    """Prune every linear layer of the blocks inside the ``with`` block, each block on what the pruned ones before give.

    Inputs are those of the calibration text; the Hessians of one block are in memory at a time.
    """
    sites = decoder.sites(LINEAR_ROLES)
    before = {site: decoder.projection(site).weight.detach().clone() for site in sites}
    try:
        with torch.no_grad():
            for block in sorted({site.block for site in sites}):
                of_block = [site for site in sites if site.block == block]
                for site, hessian in hessians(loaded, of_block).items():
                    weight = decoder.projection(site).weight
                    weight.copy_(sparsegpt(weight, hessian, share))
                loaded.on_progress("SparseGPT", block + 1, decoder.blocks, "blocks")
        yield
    finally:
        with torch.no_grad():
            for site in sites:
                decoder.projection(site).weight.copy_(before[site])


def hessians(loaded: LoadedModel, sites: Iterable[Site]) -> dict[Site, Tensor]:
    """Compute ``X^T X / tokens`` of the inputs of `sites`, in fp32 products summed in fp64 where they run on a CPU.

    Sites that read one tensor share one.
    """
    sites, calibrated = list(sites), loaded.calibrated_for(None)
    first: dict[tuple[int, str, str], Site] = {}
    for site in sites:
        first.setdefault((site.block, site.part, INPUT_OF[site.role]), site)
    sums: dict[Site, Tensor] = {}
    tokens = dict.fromkeys(first.values(), 0)

    def see(site: Site, x: Tensor) -> None:
        x = x.detach().float()
        tokens[site] += len(x)
        sums[site] = sums.get(site, 0.0) + (x.T @ x).double()

    run_watched(loaded.model, calibrated.calibration, first.values(), see, "second moments", loaded.on_progress)
    return {
        site: sums[of] / tokens[of]
        for site in sites
        for of in [first[site.block, site.part, INPUT_OF[site.role]]]
        if of in sums  # an expert that no token came to is left as it is
    }
