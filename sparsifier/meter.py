"""Measures the weight bytes that a decode step leaves unread, from the masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import Selection
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import ACT, LINEAR_ROLES, Decoder, Site

NATURAL = 0.05
"""Share of exact zeros from which an input that no rule masks counts as sparse by nature, as after a ReLU.

What lies below are accidents: products that underflow, a channel whose norm has weight 0. SiLU and GELU give less than
0.004 in any block of the models tried.
"""
LOOK = 2**16
"""Entries of such an input after which it is known whether its zeros are worth counting."""


class Meter:
    """Counts, token by token, the weights that masks leave unread.

    Byte sparsity is one minus the weights read over the weights of all matrices of the blocks; what a rule adds (bias,
    low-rank factors) counts as read. Only sparse tokens count: the figure is that of a decode step, and neither
    padding nor the tokens that the policy keeps dense move it. Exact zeros rest wherever they come from: where no rule
    masks an input that has many (`NATURAL`), they count as they do under a threshold.
    """

    def __init__(self) -> None:
        self._rules: dict[Site, Rule] = {}
        self._elements: dict[Site, int] = {}
        self._all_elements = 0
        self._read: dict[Site, float] = defaultdict(float)
        self._tokens = 0
        self._tokens_at: dict[Site, int] = {}
        self._natural: set[Site] = set()
        self._looked: dict[Site, int] = defaultdict(int)
        self._dense: set[Site] = set()  # looked at long enough: few zeros
        self._rows_kept: dict[int, Tensor] = {}

    def open(self, decoder: Decoder, rules: dict[Site, Rule]) -> None:
        """Prepares for the plan that is about to run; counts of an earlier run of the same plan stay.

        Raises
        ------
        SparsifierError
            If it has counted another plan: what they read together is the byte sparsity of neither.
        """
        if self._tokens and rules is not self._rules:
            raise SparsifierError("this meter has counted another plan: take a new one for each")
        self._rules = rules
        self._rows_kept = {}
        self._elements = {site: decoder.linear(site).weight.numel() for site in decoder.sites(LINEAR_ROLES)}
        self._all_elements = decoder.elements

    def expect(self, sites: Iterable[Site]) -> None:
        """Takes note of sites that every forward calls: one that is not called as often as others is a fault."""
        for site in sites:
            self._tokens_at.setdefault(site, 0)

    def count_tokens(self, tokens: int) -> None:
        """Counts so many sparse tokens, once per forward."""
        self._tokens += tokens

    def record(self, site: Site, kept: Tensor, selection: Selection, share: float | None = None) -> float:
        """Counts the channels that one call reads.

        Parameters
        ----------
        kept : Tensor [batch, length, channels]
            The kept input; a channel is read where it is not zero.
        selection : Selection
            The sparse tokens of this forward.
        share : float, optional
            What this method returned for the same `kept`, at another site that reads it.

        Returns
        -------
        float
            Tokens times the share of their channels that is read.
        """
        if site in self._tokens_at:
            self._tokens_at[site] += selection.tokens
        return self._count(site, kept, selection, share)

    def look(self, site: Site, x: Tensor, selection: Selection, share: float | None = None) -> float | None:
        """Counts the exact zeros of an input that no rule masks, as long as it may have many.

        Parameters and result are those of `record`; None where nothing is counted any more.
        """
        if site in self._tokens_at:
            self._tokens_at[site] += selection.tokens
        if site.role == ACT:
            self._natural.update(self._under_act(site.block))
            return self._count(site, x, selection, share)
        if site in self._dense or (site.role in ("up", "down") and Site(site.block, ACT) in self._rules):
            return None  # under a rule at `ACT` they are counted there
        self._natural.add(site)
        self._looked[site] += selection.tokens
        share = self._count(site, x, selection, share)
        enough = self._looked[site] * x.shape[-1] >= LOOK
        if enough and 1.0 - self._read[site] / self._looked[site] < NATURAL:
            self._dense.add(site)
        return share

    def _under_act(self, block: int) -> list[Site]:
        """Lists the sites whose weights a mask at `ACT` lets rest, without a mask of their own."""
        sites = [Site(block, role) for role in ("up", "down")]
        return [site for site in sites if site not in self._rules or self._rules[site].masks_nothing]

    def _count(self, site: Site, kept: Tensor, selection: Selection, share: float | None) -> float:
        rows = self._rows_kept.get(site.block)
        if site.role == ACT or (site.role == "up" and rows is not None):
            by_token = (selection.take(kept) != 0).double().mean(-1)
            if site.role == "up" and rows is not None:  # only kept rows are read, and of them only kept columns
                self._read[site] += float((by_token * rows).sum())
                return float(by_token.sum())
            self._rows_kept[site.block] = by_token
            for under in self._under_act(site.block):  # others count for themselves
                self._read[under] += float(by_token.sum())
            return float(by_token.sum())
        if share is None:
            share = selection.count_kept(kept) / kept.shape[-1]
        self._read[site] += share
        return share

    @property
    def tokens(self) -> int:
        """Gives the number of sparse tokens seen."""
        return self._tokens

    def site_sparsity(self) -> dict[Site, float]:
        """Gives the share of each linear's weights left unread, averaged over tokens, without what rules add."""
        self._check()
        shares = {site: 1.0 - self._read[site] / self._tokens if site in self._read else 0.0 for site in self._elements}
        return {site: s if self._counts(site, s) else 0.0 for site, s in shares.items()}

    def byte_sparsity(self) -> float:
        """Gives the share of block weight bytes that a sparse token leaves unread, less what rules add."""
        unread = sum(share * self._elements[site] for site, share in self.site_sparsity().items())
        added = sum(rule.extra_elements() for rule in self._rules.values())
        return (unread - added) / self._all_elements

    def _counts(self, site: Site, share: float) -> bool:
        """Tells whether a share of zeros is one that counts: all are that a mask makes."""
        return site not in self._natural or (site not in self._dense and share >= NATURAL)

    def _check(self) -> None:
        if not self._tokens:
            raise SparsifierError("no sparse token was seen: byte sparsity is not defined")
        for site, tokens in self._tokens_at.items():
            if tokens != self._tokens:
                raise SparsifierError(
                    f"the layer at {site} was called for {tokens} of {self._tokens} sparse tokens: byte sparsity is "
                    "defined where every token goes through every layer once"
                )
