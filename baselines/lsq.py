"""Offers least-squares weights for what masks leave, after the idea of DuoGPT (arXiv 2506.20194, NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from resting.sparsifier import (
    LINEAR_ROLES,
    BlockStream,
    CalibratedModel,
    Compensated,
    DivergedError,
    Plan,
    Rule,
    Site,
    SparsifierError,
    masked,
    stages,
)


@dataclass
class LeastSquares(Compensated):
    r"""Replaces weights by those that are best for masked inputs, in the least squares of each layer's own output.

    .. math::
        W' = W + W (X - \hat X) \hat X^T (\hat X \hat X^T + \lambda I)^{-1}, \qquad
        b = W \bar x - W' \bar{\hat x}

    X [in, tokens] are the inputs of the dense model, X^ what the masks of the wrapped sparsifier leave of them, both
    less their means over the tokens; lambda is `ridge` times the mean of the diagonal of ``X^ X^T``. Without `centred`
    nothing is subtracted, and there is no bias. Sums are over the tokens that the policy makes sparse, in fp64. With
    W' = W it is the bias of the mean error, so that on the calibration text the squared error of a layer is at most
    that of the mean error, and this at most that of the masks alone.

    With ``mode = "stream"`` X^ are the inputs that the compensated sparse model has at this layer, one after another,
    so that each layer also takes back what those before it have left.

    A layer's error falls on the text that it was fitted on, and on other text it *rises* where tokens are few: a weight
    of `down` has 1,536 numbers an output. Measured at block 3 of the default model, TEAL's masks at about 0.48, squared
    error over that of W x, local, on Wikipedia text that was not seen (bare: gate 0.0314, down 0.0090):

    ======  =====  ====  =====  =====  =====  ======
    layer   ridge  seen  2,000  4,000  8,000  16,352
    ======  =====  ====  =====  =====  =====  ======
    gate    0.01   .027  .0456  .0341  .0304  .0290
    gate    1      .028  .0302  .0294  .0290  .0287
    down    0.01   .0080 .0482  .0186  .0115  .0097
    down    1      .0085 .0096  .0092  .0089  .0088
    ======  =====  ====  =====  =====  =====  ======

    ("seen": on the first 2,000 of 16,352 tokens.) `ridge` is 1 here for that reason; DuoGPT's is 0.01. The shift from
    dense inputs to those of the sparse model raises the error of all of them alike, and is not the reason.

    That is not all of it. On 1,536 tokens of WikiText-2 TEAL loses 0.302 nats, lsq fitted on 4,088 tokens 0.619, and
    0.389 at a ridge of 1, where the error of these layers on unseen text is about TEAL's or below. The mean error at
    all seven roles, which hardly fits noise, loses as much (0.392, where TEAL loses 0.314, on 2,048 tokens). Under both
    the residual stream is nearer to the dense one in early blocks or as near, and further in the last ones: errors of
    layers are not independent, and what lowers each of them does not lower what they add up to. Why is open.

    It reads as many bytes as the masks alone, and the bias. Prompts that a token policy leaves dense keep W, beside W'.
    Masks stay as they were fitted, but for the one number by which measured bytes are matched.

    Source: DuoGPT, which prunes weights in the same least squares, second hand; this closed form is this project's.

    Parameters
    ----------
    sites : tuple of str
        Roles whose weights are replaced, all seven by default.
    ridge : float
        At least 0. At 0 the pseudo-inverse is taken.
    mode : {"local", "stream"}
    centred : bool
    """

    name: ClassVar[str] = "lsq"
    paper: ClassVar[str] = "after DuoGPT, arXiv 2506.20194, second hand; the closed form is this project's"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"lsq-stream": {"mode": "stream"}}

    sites: tuple[str, ...] = LINEAR_ROLES
    ridge: float = 1.0
    mode: Literal["local", "stream"] = "local"
    centred: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.ridge <= float("inf"):
            raise SparsifierError(f"ridge must be at least 0, got {self.ridge}")
        if self.mode not in ("local", "stream"):
            raise SparsifierError(f"mode must be local or stream, got {self.mode!r}")

    @property
    def replaces_weights(self) -> bool:
        """Tells that its plans bring weights of their own."""
        return True

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        base = self.inner.plan_for(calibrated)
        found = self._replacements(calibrated, base)
        return self.matched(calibrated, lambda plan: self._replaced(plan, found), start=base.nominal)

    def _replaced(self, plan: Plan, found: Mapping[Site, Rule]) -> Plan:
        rules = dict(plan.rules)
        for site, new in found.items():
            # A shift belongs to the bias: a method may have another one at other bytes.
            rules[site] = replace(rules[site], weight=new.weight, bias=new.bias, shift=new.shift)
        return replace(plan, rules=rules)

    def _replacements(self, calibrated: CalibratedModel, base: Plan) -> dict[Site, Rule]:
        """Computes the rules of all sites, with their weights and biases."""
        sites = self._masked(calibrated, base)
        dense, sparse = BlockStream(calibrated), BlockStream(calibrated) if self.mode == "stream" else None
        rules = dict(base.rules)
        for block in range(calibrated.decoder.blocks):
            here = stages([site for site in sites if site.block == block])
            for group in here if sparse is not None else [[site for stage in here for site in stage]]:
                sums = self._sums(dense, sparse, group, rules)
                for site in group:
                    weight = calibrated.decoder.projection(site).weight.detach()
                    rules[site] = sums[site].solved(rules[site], weight, self.ridge, self.centred, site)
            dense.advance({})
            if sparse is not None:
                sparse.advance(rules)
            calibrated.on_progress("least squares", block + 1, calibrated.decoder.blocks, "blocks")
        return {site: rules[site] for site in sites}

    def _sums(
        self, dense: BlockStream, sparse: BlockStream | None, group: list[Site], rules: Mapping[Site, Rule]
    ) -> dict[Site, _Sums]:
        """Sums over the calibration text at the sites of `group`; layers with one input and one mask share them."""
        sums: dict[Site, _Sums] = {}
        for site in group:
            alike = (s for s in sums if stages([s, site])[0] == [s, site] and rules[s].same_mask(rules[site]))
            sums[site] = next((sums[s] for s in alike), _Sums())
        first = {id(of): site for site, of in reversed(sums.items())}
        for x, seen in _both(dense, sparse, list(first.values()), rules):
            for site in first.values():
                sums[site].add(x[site], masked(seen[site], rules[site]))
        return sums

    def _masked(self, calibrated: CalibratedModel, base: Plan) -> list[Site]:
        wanted = calibrated.decoder.sites(self.sites)
        sites = [site for site in wanted if site in base.rules and not base.rules[site].masks_nothing]
        unmasked = {site.role for site in wanted} - {site.role for site in sites}
        if unmasked and base.target > 0 and (not sites or self.sites != LINEAR_ROLES):  # all seven: those there are
            names = ", ".join(sorted(unmasked))
            raise SparsifierError(f"{base.method} masks no input of {names}: {self.name} has nothing to make up there")
        for site in sites:
            if base.rules[site].low_rank is not None or base.rules[site].weight is not None:
                raise SparsifierError(
                    f"{base.method} stands in for the weights at {site} itself: {self.name} cannot replace them"
                )
        return sites


def _both(
    dense: BlockStream, sparse: BlockStream | None, sites: list[Site], rules: Mapping[Site, Rule]
) -> Iterator[tuple[dict[Site, Tensor], dict[Site, Tensor]]]:
    """Yields the inputs of the dense model, and those of the sparse model for the same tokens."""
    if sparse is None:
        yield from ((x, x) for x in dense.inputs(sites, {}))
    else:
        yield from zip(dense.inputs(sites, {}), sparse.inputs(sites, rules))


@dataclass
class _Sums:
    """Sums in fp64 ``(x - x^) x^^T`` and ``x^ x^^T`` [in, in], ``x`` and ``x^`` [in], over tokens."""

    tokens: int = 0
    cross: Any = field(default=0.0)
    gram: Any = field(default=0.0)
    x: Any = field(default=0.0)
    kept: Any = field(default=0.0)

    def add(self, x: Tensor, kept: Tensor) -> None:
        """Counts inputs and what is kept of them, both [tokens, in]."""
        x, kept = x.double(), kept.double()
        self.tokens += len(x)
        self.cross = self.cross + (x - kept).T @ kept
        self.gram = self.gram + kept.T @ kept
        self.x, self.kept = self.x + x.sum(0), self.kept + kept.sum(0)

    def solved(self, rule: Rule, weight: Tensor, ridge: float, centred: bool, site: Site) -> Rule:
        """Gives `rule` with the weights, as `weight` [out, in] has its numbers, and the bias that are best here."""
        wide = weight.double()
        dropped, kept = (self.x - self.kept) / self.tokens, self.kept / self.tokens
        if centred:
            cross = self.cross - self.tokens * torch.outer(dropped, kept)
            gram, right = self.gram - self.tokens * torch.outer(kept, kept), wide @ cross
        else:
            gram, right = self.gram, wide @ self.cross
            if rule.bias is not None:  # it makes up for a part already
                right = right - torch.outer(rule.bias.to(wide), self.kept)
        moved = wide + _divided(right, gram, ridge)
        bias = rule.bias
        if centred:
            bias = (wide @ (dropped + kept) - moved @ kept).float().cpu()
        new = moved.to(weight.dtype).cpu()
        if not bool(torch.isfinite(new).all()):
            raise DivergedError(f"least-squares weights at {site} are NaN or infinite: raise the ridge")
        return replace(rule, weight=new, bias=bias)


def _divided(right: Tensor, gram: Tensor, ridge: float) -> Tensor:
    """Computes ``right (gram + lambda I)^-1`` for `gram` [in, in], lambda being `ridge` times its mean diagonal."""
    if ridge == float("inf") or not bool(right.any()):
        return torch.zeros_like(right)
    if ridge == 0.0:
        return right @ torch.linalg.pinv(gram, hermitian=True)
    damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    factor, info = torch.linalg.cholesky_ex(damped)
    if int(info):
        return right @ torch.linalg.pinv(damped, hermitian=True)
    return torch.cholesky_solve(right.T, factor).T
