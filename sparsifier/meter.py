"""Measures the weight bytes that a decode step leaves unread, from the masks."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import Selection
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import ACT, LINEAR_ROLES, Decoder, Site


class Meter:
    """Counts, token by token, the weights that masks leave unread.

    Byte sparsity is one minus the weights read over the weights of all block linears; what a rule adds (bias,
    low-rank factors) counts as read. Only sparse tokens count: the figure is that of a decode step, and neither
    padding nor the tokens that the policy keeps dense move it.
    """

    def __init__(self) -> None:
        self._rules: dict[Site, Rule] = {}
        self._elements: dict[Site, int] = {}
        self._read: dict[Site, float] = defaultdict(float)
        self._tokens = 0
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
        rows = self._rows_kept.get(site.block)
        if site.role == ACT or (site.role == "up" and rows is not None):
            by_token = (selection.take(kept) != 0).double().mean(-1)
            if site.role == "up" and rows is not None:  # only kept rows are read, and of them only kept columns
                self._read[site] += float((by_token * rows).sum())
                return float(by_token.sum())
            self._rows_kept[site.block] = by_token
            for role in ("up", "down"):
                rule = self._rules.get(Site(site.block, role))
                if rule is None or rule.masks_nothing:  # else that site counts for itself
                    self._read[Site(site.block, role)] += float(by_token.sum())
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
        return {site: 1.0 - self._read[site] / self._tokens if site in self._read else 0.0 for site in self._elements}

    def byte_sparsity(self) -> float:
        """Gives the share of block weight bytes that a sparse token leaves unread, less what rules add."""
        unread = sum(share * self._elements[site] for site, share in self.site_sparsity().items())
        added = sum(rule.extra_elements() for rule in self._rules.values())
        return (unread - added) / sum(self._elements.values())

    def _check(self) -> None:
        if not self._tokens:
            raise SparsifierError("no sparse token was seen: byte sparsity is not defined")
