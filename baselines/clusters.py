"""Implements activation pattern clustering (arXiv 2507.14179), in a form that saves bytes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from resting.sparsifier import (
    CalibratedModel,
    NeuronMask,
    NeuronSparsifier,
    NeuronTokens,
    Plan,
    Site,
    SparsifierError,
    down_norms,
    neuron_tokens,
)

SCORES = {"head": "clusters-head", "oracle": "clusters", "prompt": "clusters-prompt"}
HELD_OUT = 8
"""Every so many tokens one is kept from the clustering, for the figures in a plan's `info`."""


@dataclass
class Clusters(NeuronSparsifier):
    r"""Lets each token use one of a few sets of neurons, learnt from the patterns of calibration tokens.

    .. math::
        w_{tj} = z_{tj}^2 \, \|W_{down,:j}\|^2, \qquad a(t) = \arg\max_c \sum_{j \in c} w_{tj}, \qquad
        c = \text{the } k \text{ largest } \textstyle\sum_{t: a(t) = c} w_{tj}

    by turns, from a k-means++ start: exact coordinate ascent of ``sum_t sum_(j in a(t)) w_tj``, which never falls. One
    set is a static mask by ``sum_t w_tj``, as many as tokens are the oracle. Weights are taken over their token's sum
    where `relative`, since what a few tokens of massive activations lose is not what the others do.

    Which set a token gets is said by a linear head on the MLP's input, whose bytes are counted; by the oracle; or
    once for a sequence, by its prompt. The head is the ridge regression of the share that each set keeps, whose
    largest is taken: choosing the second of two sets that are alike costs nothing, where a classifier would pay.

    Source: the idea is the paper's; centroids as sets, the objective and the head are ours. The authors' code
    (nobeldhar/Activation-Aware-Clustering, MIT) mixes binary and real centroids, assigns by the true pattern, and
    trains no predictor. Their "precision" is the coverage ``sum a c / sum a`` of patterns by sets, whose chance level
    is the share of neurons that a set holds: a plan's `info` has both, on tokens that were held out.

    Parameters
    ----------
    sets : int
        K, the number of sets.
    assign : {"head", "oracle", "prompt"}
    tokens : int
        Calibration tokens whose patterns are clustered.
    restarts : int
        Starts, of which the best is taken.
    ridge : float
        Of the regression, times the mean of the diagonal of its matrix.
    relative : bool
    """

    name: ClassVar[str] = "clusters"
    paper: ClassVar[str] = "the idea of arXiv 2507.14179 (Euro-Par 2025), the form ours; baselines/clusters.py"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "clusters-oracle": {"assign": "oracle"},
        "clusters-prompt": {"assign": "prompt"},
    }

    sets: int = 64
    assign: Literal["head", "oracle", "prompt"] = "head"
    tokens: int = 4096
    restarts: int = 3
    ridge: float = 0.1
    relative: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.assign not in SCORES:
            raise SparsifierError(f"assign must be head, oracle or prompt, got {self.assign!r}")
        for name in ("sets", "tokens", "restarts"):
            if getattr(self, name) < 1:
                raise SparsifierError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.ridge > 0:
            raise SparsifierError(f"ridge must be above 0, got {self.ridge}")

    @property
    def score(self) -> str:
        return SCORES[self.assign]

    def extra_elements(self, hidden: int, neurons: int) -> float:
        return self.sets * (hidden + 1) + neurons / 16 if self.assign == "head" else 0.0

    def masks(self, calibrated: CalibratedModel, share: float) -> dict[Site, NeuronMask]:
        return {site: mask for site, (mask, _) in self._found(calibrated, share).items()}

    def plan_at(self, calibrated: CalibratedModel, nominal: float) -> Plan:
        plan = super().plan_at(calibrated, nominal)
        if not plan.neurons:
            return plan
        found = self._found(calibrated, next(iter(self.ratios(calibrated, nominal).values())))
        figures = [figures for _, figures in found.values()]
        mean = {name: round(sum(f[name] for f in figures) / len(figures), 4) for name in figures[0]}
        return replace(plan, info=plan.info | {"clusters": mean})

    def _found(self, calibrated: CalibratedModel, share: float) -> dict[Site, tuple[NeuronMask, dict[str, float]]]:
        spec = {name: value for name, value in self.spec().items() if name != "target"}
        key = f"clusters {json.dumps(spec, sort_keys=True)} {share} {calibrated.calibration.statistics_policy}"
        if key not in calibrated.cached:
            decoder, kept = calibrated.decoder, neuron_tokens(calibrated, self.tokens)
            found = {}
            for done, (site, seen) in enumerate(kept.items(), 1):
                count = self.kept(decoder.mlp_shape(site)[1], share)
                found[site] = self._cluster(seen, down_norms(decoder, site), count, calibrated.device)
                calibrated.on_progress("clusters", done, len(kept), "blocks")
            calibrated.cached[key] = found
        return calibrated.cached[key]

    @torch.no_grad()
    def _cluster(
        self, seen: NeuronTokens, scale: Tensor, kept: int, device: torch.device
    ) -> tuple[NeuronMask, dict[str, float]]:
        weights = token_weights(seen.z.to(device), scale.to(device), self.relative)
        held = torch.arange(len(weights), device=device) % HELD_OUT == HELD_OUT - 1
        fitted, test = weights[~held], weights[held] if bool(held.any()) else weights
        generator = torch.Generator().manual_seed(self.seed)
        book, _ = codebook(fitted, kept, self.sets, self.restarts, generator)
        tensors = {"codebook": book.to(torch.uint8).cpu()}
        chosen = assigned(test, book)
        figures = {"chance": kept / weights.shape[1]} | _figures(test, book, chosen, kept, "")
        if self.assign == "head":
            x = seen.x.to(device).float()
            head, bias = linear_head(x[~held], shares(fitted, book), self.ridge)
            tensors |= {"head": head.cpu(), "head_bias": bias.cpu()}
            predicted = ((x[held] if bool(held.any()) else x) @ head.float().T + bias.float()).argmax(-1)
            figures |= _figures(test, book, predicted, kept, " predicted")
        mask = NeuronMask(self.score, scale=None if self.assign == "head" else scale, tensors=tensors)
        return mask, figures


def token_weights(z: Tensor, scale: Tensor, relative: bool) -> Tensor:
    """Computes ``(scale_j z_tj)^2`` of `z` [tokens, neurons] in fp32, over the sum of its token where `relative`."""
    scaled = z.float() * scale
    if not relative:
        return scaled.square()
    scaled = scaled / scaled.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    squares = scaled.square()
    return squares / squares.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def codebook(
    weights: Tensor, kept: int, count: int, restarts: int, generator: torch.Generator, rounds: int = 50
) -> tuple[Tensor, list[float]]:
    """Finds `count` sets of `kept` neurons each that keep most of `weights` [tokens, neurons].

    Returns
    -------
    book : Tensor [sets, neurons] of bool
        Fewer than `count` sets where the others would keep no more.
    objective : list of float
        The kept weight after each round of the best start; it never falls.
    """
    own = largest_sets(weights, kept)
    best: tuple[Tensor, list[float]] | None = None
    for _ in range(restarts):
        book = _start(weights, own, count, generator)
        objective: list[float] = []
        for _ in range(rounds):
            value, chosen = _kept_weight(weights, book).max(1)
            objective.append(float(value.double().sum()))
            if len(objective) > 1 and objective[-1] <= objective[-2] * (1 + 1e-6):
                break
            sums = torch.zeros(book.shape, dtype=torch.float32, device=weights.device).index_add_(0, chosen, weights)
            empty = torch.bincount(chosen, minlength=len(book)) == 0
            moved = largest_sets(sums, kept)
            if bool(empty.any()):  # an empty set goes to a token that loses most
                lost = (weights * own).sum(1) - value
                moved[empty] = own[lost.topk(min(int(empty.sum()), len(lost))).indices][: int(empty.sum())]
            book = moved
        if best is None or objective[-1] > best[1][-1]:
            best = book, objective
    assert best is not None
    return best


def largest_sets(weights: Tensor, kept: int) -> Tensor:
    """Marks the `kept` largest of every row: bool, as `weights`."""
    chosen = weights.topk(kept, -1, sorted=False).indices
    return torch.zeros_like(weights, dtype=torch.bool).scatter_(-1, chosen, True)


def assigned(weights: Tensor, book: Tensor) -> Tensor:
    """Gives each token the set that keeps most of its weights: [tokens]."""
    return _kept_weight(weights, book).argmax(1)


def shares(weights: Tensor, book: Tensor) -> Tensor:
    """Computes the share of each token's weight that each set keeps: [tokens, sets]."""
    tiny = torch.finfo(torch.float32).tiny
    return _kept_weight(weights, book) / weights.sum(1, keepdim=True).clamp_min(tiny)


def linear_head(x: Tensor, wanted: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Regresses `wanted` [tokens, sets] on `x` [tokens, hidden], both centred.

    Returns
    -------
    head : Tensor [sets, hidden] of float16
        Over its largest entry, which changes no order.
    bias : Tensor [sets] of float16
    """
    centre, mean = x.mean(0), wanted.mean(0)
    centred = (x - centre).double()
    gram = centred.T @ centred
    gram.diagonal().add_(ridge * float(gram.diagonal().mean()) + torch.finfo(torch.float64).tiny)
    head = torch.linalg.solve(gram, centred.T @ (wanted - mean).double()).T
    bias = mean.double() - head @ centre.double()
    bias = bias - bias.mean()  # the same for all sets: no order depends on it
    largest = max(float(head.abs().max()), float(bias.abs().max()), torch.finfo(torch.float32).tiny)
    return (head / largest).half(), (bias / largest).half()


def _kept_weight(weights: Tensor, book: Tensor) -> Tensor:
    return weights @ book.to(weights).T


def _start(weights: Tensor, own: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Chooses tokens whose own sets begin, each with a chance in proportion to what the chosen ones lose of it."""
    best = (weights * own).sum(1)
    first = int(torch.randint(len(weights), (1,), generator=generator))
    chosen, held = [first], (weights * own[first]).sum(1)
    while len(chosen) < count:
        lost = (best - held).clamp_min(0.0).double().cpu()
        lost[lost <= 1e-6 * best.double().cpu()] = 0.0
        if not bool(lost.any()):
            break
        new = int(torch.multinomial(lost, 1, generator=generator))
        chosen.append(new)
        held = torch.maximum(held, (weights * own[new]).sum(1))
    return own[torch.tensor(chosen, device=own.device)].clone()


def _figures(weights: Tensor, book: Tensor, chosen: Tensor, kept: int, name: str) -> dict[str, float]:
    """Gives the coverage of each token's own set by its cluster's, and the share of the weight that is kept."""
    overlap = (largest_sets(weights, kept) & book[chosen]).double().sum(1).mean() / max(1, kept)
    held = shares(weights, book).gather(1, chosen[:, None]).mean()
    return {f"coverage{name}": float(overlap), f"kept weight{name}": float(held)}
