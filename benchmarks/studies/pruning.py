"""Compares with static weight pruning at equal bytes: what choosing inputs token by token buys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.quality import perplexity
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.plans import fitted
from resting.benchmarks.report.compared import literature
from resting.benchmarks.report.compared.literature import Figure
from resting.benchmarks.report.table import Table, markdown, shown_target
from resting.benchmarks.studies.sparsegpt import pruned_in_turn
from resting.benchmarks.studies.study import Study, write
from resting.sparsifier import LINEAR_ROLES, AllButFirst, Decoder, OnProgress, Plan, Site, fingerprint
from resting.sparsifier.statistics import Moments, run_watched

SPARSEGPT = "sparsegpt"
BITMAP = 1 / 16
"""Bytes of a bit a weight over those of a 16-bit weight: the least that unstructured pruning has to store of places."""


def magnitude(weight: Tensor, norms: Tensor, share: float) -> Tensor:
    """Zero the `share` of the entries of `weight` [out, in] that are smallest in the whole matrix."""
    del norms
    return _without(weight.flatten()[None], weight.abs().flatten()[None], share).view_as(weight)


def wanda(weight: Tensor, norms: Tensor, share: float) -> Tensor:
    """Zero the `share` of every row that has the least ``|W_ij| ||X_j||_2`` (arXiv 2306.11695, eq. 1).

    Parameters
    ----------
    weight : Tensor [out, in]
    norms : Tensor [in]
        ``||X_j||_2`` over calibration tokens, up to a factor.
    share : float
    """
    return _without(weight, weight.abs().float() * norms.to(weight.device, torch.float32), share)


PRUNERS: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"magnitude": magnitude, "wanda": wanda}


def _without(weight: Tensor, scores: Tensor, share: float) -> Tensor:
    """`weight` [rows, n] with the `share` of each row that scores least set to zero."""
    count = round(share * weight.shape[1])
    return weight.scatter(1, scores.topk(count, dim=1, largest=False, sorted=False).indices, 0.0)


@contextmanager
def pruned(decoder: Decoder, name: str, norms: Mapping[Site, Tensor], share: float) -> Iterator[None]:
    """Zero a `share` of every linear layer's weights in the blocks inside the ``with`` block."""
    sites = decoder.sites(LINEAR_ROLES)
    before = {site: decoder.projection(site).weight.detach().clone() for site in sites}
    try:
        with torch.no_grad():
            for site in sites:
                weight = decoder.projection(site).weight
                weight.copy_(PRUNERS[name](weight, norms[site], share))
        yield
    finally:
        with torch.no_grad():
            for site in sites:
                decoder.projection(site).weight.copy_(before[site])


def input_norms(loaded: LoadedModel) -> dict[Site, Tensor]:
    """Measure the root mean square of every input channel of every linear layer, on the calibration text."""
    calibrated = loaded.calibrated_for(None)
    sites = calibrated.decoder.sites(LINEAR_ROLES)
    moments = {site: Moments() for site in sites}
    run_watched(
        loaded.model,
        calibrated.calibration,
        sites,
        lambda site, x: moments[site].add(x),
        "norms of inputs",
        loaded.on_progress,
    )
    return {site: of.root_mean_square for site, of in moments.items()}


def measure(loaded: LoadedModel, cells: list[Cell]) -> pd.DataFrame:
    """Measure perplexity and KL of the suite's plans and of pruned weights, by method, target and text.

    The share of zeros is the target, so that the weights that are left are as many bytes as a plan at that target
    reads; and once more with the bitmap of their places counted.
    """
    texts = loaded.suite.evaluation.texts
    references = {text: loaded.reference(text) for text in texts}
    for reference in references.values():
        for start in range(0, len(reference.windows), reference.batch_size):
            reference.hidden(start)  # of the dense model, before any weight is gone
    rows: list[dict[str, object]] = []

    def add(method: str, target: float, plan: Plan, bytes_left_out: float | None = None) -> None:
        for text, reference in references.items():
            score = perplexity.score(reference, plan, AllButFirst(1))
            (value, error), (kl, _) = score.perplexity(), score.divergence()
            rows.append(
                {
                    "method": method,
                    "target": target,
                    "byte_sparsity": score.byte_sparsity if bytes_left_out is None else bytes_left_out,
                    "dataset": text,
                    "perplexity": value,
                    "stderr": error,
                    "kl": kl,
                }
            )
            loaded.on_progress(f"{method} at {target:g}", len(rows), len(rows), "texts")

    for cell in cells:
        if cell.sparsifier is not None and cell.config.name != "dense":
            add(cell.label, cell.target, fitted(loaded, cell))
    norms, decoder = input_norms(loaded), Decoder.of(loaded.model)
    targets = sorted({cell.target for cell in cells if cell.target})
    if not targets:
        raise SuiteError("the study of pruning needs a suite with a sparsity above 0")
    for name in (*PRUNERS, SPARSEGPT):
        for target in targets:
            for label, share in ((name, target), (f"{name}, bitmap counted", target + BITMAP)):
                if share > 1.0:
                    continue
                in_turn = name == SPARSEGPT
                with pruned_in_turn(loaded, decoder, share) if in_turn else pruned(decoder, name, norms, share):
                    plan = Plan({}, label, target, target, fingerprint.of_model(loaded.model))
                    add(label, target, plan, bytes_left_out=target)
    return pd.DataFrame(rows)


def run(study: Study, on_progress: OnProgress) -> Path:
    """Measure, and write a table into ``OUTPUT/SUITE-pruning``."""
    frame = measure(study.loaded(on_progress), study.cells())
    texts = list(frame.dataset.unique())
    lines = [
        [
            str(method),
            shown_target(target),
            *(f"{of[of.dataset == text].perplexity.mean():.2f}" for text in texts),
            f"{of.kl.mean():.3f}",
        ]
        for (method, target), of in frame.groupby(["method", "target"], sort=False)
    ]
    about = (
        "Perplexity, and mean KL to the dense model in nats a token. Pruning removes a share of the weights of every "
        "linear layer of the blocks, unstructured, without retraining; the methods of the suite leave the same share "
        "of bytes unread, but which weights these are differs from token to token. A pruned matrix has to store the "
        "places of what is left too: with the bitmap counted, so many more weights are removed that both fit. "
        "Pruning acts on every token, the plans on all but the first. The norms of Wanda are of the dense model, and "
        "not taken again behind pruned blocks; SparseGPT goes block by block, on what the pruned ones before give, "
        "and moves the weights that are left."
    )
    parts = [about, markdown(lines, ["method", "target", *texts, "KL"]), *_published(study, frame)]
    return write(study, "pruning", "Against weight pruning", parts, frame)


def _published(study: Study, frame: pd.DataFrame) -> list[str]:
    """Set what was published beside it, where the suite names some."""

    def get(method: str, figure: Figure) -> tuple[float, float] | None:
        of = frame[(frame.method == method) & (frame.target == figure.sparsity)]
        of = of[of.dataset + "_perplexity" == figure.metric]
        return None if of.empty else (float(of.perplexity.mean()), float(of.byte_sparsity.mean()))

    found = literature.sections(study.suite.literature, study.suite.models, {study.source.name: get})
    return [part.markdown() if isinstance(part, Table) else part for part in found]
