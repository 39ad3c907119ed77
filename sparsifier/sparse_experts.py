"""Runs the experts of a block under masks: one implementation for all families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from resting.sparsifier.experts import Experts
from resting.sparsifier.layers import SharedInput, SparseProduct, StandIn
from resting.sparsifier.meter import Meter
from resting.sparsifier.policy import Selection
from resting.sparsifier.projection import Projection
from resting.sparsifier.roles import ACT
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import EXPERT, Site
from resting.sparsifier.token_tracker import TokenTracker

Read = Callable[[Site, Tensor, Selection], Tensor]
"""Is shown the tensor at a site, and gives what is to be read in its place."""
See = Callable[[Site, Tensor, Selection], None]
"""Is shown a tensor at a site: tokens of one expert, and which of them are sparse."""


def dense_product(projection: Projection, x: Tensor) -> Tensor:
    """Computes one expert's product as transformers does, to the bit."""
    bias = projection.bias
    if not projection.transposed:
        return F.linear(x, projection.weight, bias)
    y = x @ projection.weight.t()
    return y if bias is None else y + bias


def run_experts(
    experts: Experts,
    block: int,
    hidden: Tensor,
    chosen: Tensor,
    weights: Tensor,
    selection: Selection,
    product: Callable[[Site, Projection, Tensor, Selection], Tensor],
    act: Read,
    see_up: See | None = None,
) -> Tensor:
    """Computes gated experts, expert by expert, in the order and with the roundings of transformers' eager form.

    Parameters
    ----------
    hidden : Tensor [tokens, hidden]
    chosen, weights : Tensor [tokens, k]
        Experts of each token, and what their outputs are multiplied with; a number beyond the last expert is none.
    selection : Selection
        Of the whole forward; each expert gets the part of it that its tokens are.
    product : callable
        Computes what stands in for a matrix.
    act : callable
        Gives what is kept of the activated gate.
    see_up : callable, optional
        Is shown what the activated gate is multiplied with, at the site of the matrix that gives it.
    """
    module: Any = experts.module
    total = torch.zeros_like(hidden)
    first, last = experts.roles
    for expert in chosen.unique().tolist():
        if expert >= experts.count:
            continue
        position, token = torch.where(chosen.t() == expert)  # in the order of transformers
        here, part = selection.at(token), f"{EXPERT}{expert}"
        x = hidden[token]
        y = product(Site(block, first, part), experts.projection(first, expert), x, here)
        if experts.has_act and not experts.gated:
            y = act(Site(block, ACT, part), module.act_fn(y), here)
        elif experts.has_act:
            gate, up = y.chunk(2, -1)
            opened = act(Site(block, ACT, part), module.act_fn(gate), here)
            if see_up is not None:
                see_up(Site(block, first, part), up, here)
            y = opened * up
        else:
            y = module._apply_gate(y) if experts.gated else module.act_fn(y)
        y = product(Site(block, last, part), experts.projection(last, expert), y, here)
        y = y * weights[token, position, None]
        total.index_add_(0, token, y.to(total.dtype))
    return total


class ExpertProduct(SparseProduct):
    """Stands in for the matrix of one expert."""

    def __init__(self, site: Site, projection: Projection, rule: Rule, shared: SharedInput) -> None:
        self.linear = projection
        self.prepare(site, rule, shared, projection.weight)

    def __call__(self, x: Tensor, selection: Selection) -> Tensor:
        return self.product(partial(dense_product, self.linear), x, selection)


class ExpertsStandIn(StandIn):
    """Stands for a module of experts; other modules may read its settings."""

    stands_for = "experts"

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("experts"), name)


class SparseExperts(ExpertsStandIn):
    """Runs experts with their resting inputs set to zero; the router is untouched.

    Attributes
    ----------
    experts : nn.Module
        The module it stands for.
    products : dict of Site to ExpertProduct
        What stands in for the experts' matrices.
    acts : dict of Site to SharedInput
        What masks their activated gates.
    """

    def __init__(
        self, experts: Experts, block: int, tokens: TokenTracker, rules: Mapping[Site, Rule], meter: Meter | None
    ) -> None:
        super().__init__()
        self.experts, self.tokens = experts.module, tokens
        self._known, self._block = experts, block
        self.products: dict[Site, ExpertProduct] = {}
        self.acts: dict[Site, SharedInput] = {}
        for site, projection in _sites(experts, block):
            if site in rules or meter is not None:
                rule = rules.get(site, Rule())
                self.products[site] = ExpertProduct(site, projection, rule, SharedInput(rule, meter, readers=1))
        for site in (Site(block, ACT, f"{EXPERT}{expert}") for expert in range(experts.count)):
            if site in rules:
                self.acts[site] = SharedInput(rules[site], meter, readers=1)

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        selection = self.tokens.selection
        return run_experts(self._known, self._block, hidden, chosen, weights, selection, self._product, self._act)

    def _product(self, site: Site, projection: Projection, x: Tensor, selection: Selection) -> Tensor:
        product = self.products.get(site)
        return dense_product(projection, x) if product is None else product(x, selection)

    def _act(self, site: Site, x: Tensor, selection: Selection) -> Tensor:
        shared = self.acts.get(site)
        return x if shared is None else shared.read(x, site, selection)


def _sites(experts: Experts, block: int) -> Iterator[tuple[Site, Projection]]:
    for expert in range(experts.count):
        for role in experts.roles:
            yield Site(block, role, f"{EXPERT}{expert}"), experts.projection(role, expert)


class WatchedExperts(ExpertsStandIn):
    """Runs dense experts and shows what they read and give."""

    def __init__(self, experts: Experts, block: int, tokens: TokenTracker, read: See, give: See) -> None:
        super().__init__()
        self.experts, self.tokens = experts.module, tokens
        self._known, self._block, self._read, self._give = experts, block, read, give

    def forward(self, hidden: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        selection = self.tokens.selection
        return run_experts(
            self._known, self._block, hidden, chosen, weights, selection, self._product, self._act, self._give
        )

    def _product(self, site: Site, projection: Projection, x: Tensor, selection: Selection) -> Tensor:
        self._read(site, x, selection)
        return dense_product(projection, x)

    def _act(self, site: Site, x: Tensor, selection: Selection) -> Tensor:
        self._read(site, x, selection)
        return x
