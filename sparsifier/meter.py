"""Measures the weight bytes that a decode step leaves unread, from the masks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

import torch
from torch import Tensor

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.kept_counts import Kept, KeptCounts
from resting.sparsifier.natural_zeros import NATURAL, NaturalZeros
from resting.sparsifier.neurons.mask import NeuronMask
from resting.sparsifier.policy import Selection
from resting.sparsifier.roles import ACT, NEURONS
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site

Key = TypeVar("Key", bound=Hashable)
Share = float | Tensor | Kept
"""Tokens times a share of channels; where it was counted on a GPU a tensor [] in fp64, or what will be added up."""
PLAIN_BITS = 16.0
"""Of a weight that is not stored in fewer bits: bfloat16 or float16, in which a model is decoded, whatever it is
measured in."""


class Meter:
    """Counts, token by token, the weights that masks leave unread.

    Byte sparsity is one minus the weights read over the weights of all matrices of the blocks; what a rule adds (bias,
    low-rank factors) or a neuron mask (a predictor) counts as read. Only sparse tokens count: the
    figure is that of a decode step, and neither padding nor the tokens that the policy keeps dense move it. Exact zeros
    rest wherever they come from: where no rule masks an input that has many (`NATURAL`), they count as they do under a
    threshold.
    """

    def __init__(self) -> None:
        self._rules: dict[Site, Rule] = {}
        self._decoder: Decoder | None = None
        self._elements: dict[Site, int] = {}
        self._always_read = 0.0
        self._adapters = 0.0
        self._read: dict[Site, float | Tensor] = defaultdict(float)  # on a GPU sums stay there until they are asked for
        self._kept = KeptCounts()  # what masks keep that have counts already
        self._tokens = 0
        self._tokens_at: dict[Site, int] = {}
        self._natural = NaturalZeros()
        self._other_masks: dict[Site, str] = {}
        self._under_acts: dict[Site, dict[Site, float]] = {}
        self._pending: dict[Site, Tensor] = {}  # a site under `ACT`, of which rows or columns are known so far
        self._by_rows: set[Site] = set()  # whose outputs rest, and not only inputs
        self._neurons: Mapping[Site, NeuronMask] = {}
        self._under_neurons: dict[Site, dict[Site, float]] = {}  # what rests under each, and how much of it
        self._known: tuple[dict[Site, float], dict[Site, float]] | None = None  # `_measured`, until more is counted

    def open(
        self,
        decoder: Decoder,
        rules: dict[Site, Rule],
        neurons: Mapping[Site, NeuronMask] | None = None,
        adapters: float = 0.0,
    ) -> None:
        """Prepares for the plan that is about to run; counts of an earlier run of the same plan stay.

        `adapters` counts the elements of a transform's adapters, which every token reads.

        Raises
        ------
        SparsifierError
            If it has counted another plan: what they read together is the byte sparsity of neither.
        """
        neurons = {} if neurons is None else neurons
        if self._tokens and (rules is not self._rules or dict(neurons) != dict(self._neurons)):
            raise SparsifierError("this meter has counted another plan: take a new one for each")
        self._rules, self._neurons, self._adapters = rules, neurons, adapters
        self._under_neurons = {s: decoder.rests_under_neurons(s, m.known.reads_whole) for s, m in neurons.items()}
        self._pending, self._other_masks, self._under_acts, self._known = {}, {}, {}, None
        self._decoder = decoder
        self._elements = {site: decoder.projection(site).elements for site in decoder.matrices}
        self._always_read = sum(sum(block.dense.values()) for block in decoder.found)

    def expect(self, sites: Iterable[Site]) -> None:
        """Takes note of sites that every token comes to: one that is not called as often as others is a fault."""
        for site in sites:
            self._tokens_at.setdefault(site, 0)

    def count_tokens(self, tokens: int) -> None:
        """Counts so many sparse tokens, once per forward, before its layers."""
        self._settle()
        self._tokens += tokens
        self._known = None

    def record(
        self,
        site: Site,
        kept: Tensor,
        selection: Selection,
        share: Share | None = None,
        counts: Tensor | None = None,
    ) -> Share:
        """Counts the channels that one call reads.

        Parameters
        ----------
        kept : Tensor [batch, length, channels]
            The kept input; a channel is read where it is not zero.
        selection : Selection
            The sparse tokens of this forward.
        share : float, optional
            What this method returned for the same `kept`, at another site that reads it.
        counts : Tensor [batch, length, 1], optional
            Entries of every token of `kept` that are not zero, where they are known.

        Returns
        -------
        float, Tensor [] or Kept
            Tokens times the share of their channels that is read.
        """
        self._see_tokens(site, kept, selection)
        return self._count_or_keep(site, kept, selection, share, counts)

    def record_neurons(self, site: Site, keep: Tensor, selection: Selection) -> None:
        """Counts the rows of gate and up and the columns of down that a neuron mask keeps.

        Where a rule masks the inputs of gate or up as well, of the kept rows only the kept columns are read; where one
        masks the input of down, that counts both.

        Parameters
        ----------
        site : Site
            With the role `NEURONS`.
        keep : Tensor [batch, length, neurons] of bool
        selection : Selection
        """
        self._known = None
        by_token = selection.share_by_token(keep)
        for under, part in self._under_neurons[site].items():
            rows = part * by_token + 1.0 - part
            self._by_rows |= {under} if under.role != "down" else set()
            if self._is_free(under):
                self._read[under] = self._read[under] + _total(rows)
            elif under.role != "down":  # its input came before
                self._read[under] = self._read[under] + _total(self._pending.pop(under) * rows)

    def _is_free(self, site: Site) -> bool:
        """Tells whether no rule masks the input at `site`."""
        return site not in self._rules or self._rules[site].masks_nothing

    def _neuron_site(self, site: Site) -> Site | None:
        """Gives the site of the neuron mask that lets a part of the matrix at `site` rest."""
        if not self._under_neurons:
            return None
        mask = site._replace(role=NEURONS)
        return mask if site in self._under_neurons.get(mask, {}) else None

    def look(
        self,
        site: Site,
        x: Tensor,
        selection: Selection,
        share: Share | None = None,
        counts: Tensor | None = None,
    ) -> Share | None:
        """Counts the exact zeros of an input that no rule masks, as long as it may have many.

        Parameters and result are those of `record`; None where nothing is counted any more.
        """
        self._see_tokens(site, x, selection)
        if not self.wants(site):
            return None
        if site.role == ACT:
            self._natural.sites.update(self._under_act(site))
        elif not self._natural.begin(site, x, selection, counts):
            return None
        return self._count_or_keep(site, x, selection, share, counts)

    def wants(self, site: Site) -> bool:
        """Tells whether `look` counts at `site`: not where a mask counts it, nor where few zeros were found."""
        if site.role == ACT:
            return True
        if site in self._natural.few or self._neuron_site(site) is not None:
            return False
        act = site._replace(role=ACT)
        return act not in self._rules or site not in self._under_act(act)

    def _settle(self) -> None:
        """Adds up what earlier forwards kept, and finds inputs with few zeros."""
        self._kept.settle()
        self._natural.settle(self._reads)

    def _reads(self) -> dict[Site, float]:
        """Gives tokens times the share of their channels that is read, of what was counted."""
        read = _values(self._read)
        for site, value in self._kept.totals().items():
            read[site] = read.get(site, 0.0) + value
        return read

    def _see_tokens(self, site: Site, x: Tensor, selection: Selection) -> None:
        self._known = None
        if site in self._tokens_at or site.is_expert:
            self._tokens_at[site] = self._tokens_at.get(site, 0) + selection.tokens_of(x)

    def _under_act(self, act: Site) -> dict[Site, float]:
        """Lists the sites without a mask of their own whose weights one at `act` lets rest, and how much of each."""
        assert self._decoder is not None
        if act not in self._under_acts:
            under = self._decoder.rests_under_act(act)
            self._under_acts[act] = {s: share for s, share in under.items() if self._is_free(s)}
        return self._under_acts[act]

    def _count_or_keep(
        self, site: Site, kept: Tensor, selection: Selection, share: Share | None, counts: Tensor | None
    ) -> Share:
        """Counts what one call reads, or keeps its counts until those of all masks are added up."""
        if counts is None or site.is_expert or self._other_mask(site):
            return self._count(site, kept, selection, share, counts)
        if not isinstance(share, Kept) or share.is_settled:  # the first that reads this input
            share = self._kept.add(Kept(counts, selection, kept.shape[-1]))
        share.sites.append(site)
        return share

    def _count(
        self, site: Site, kept: Tensor, selection: Selection, share: Share | None, counts: Tensor | None = None
    ) -> Share:
        if other := self._other_mask(site):
            by_token = selection.share_by_token(kept, counts)
            if other == ACT:
                self._count_gated(site, by_token, site._replace(role=ACT))
            else:
                self._pending[site] = by_token  # waits for the rows
            return _total(by_token)
        if share is None or isinstance(share, Kept):
            share = selection.count_kept(kept, counts) / kept.shape[-1]
        self._read[site] = self._read[site] + share  # not in place: a tensor may have been made in inference mode
        return share

    def _other_mask(self, site: Site) -> str:
        """Gives the role of another mask that decides, token by token, which rows or columns at `site` are read."""
        if site not in self._other_masks:
            gated = site.role == ACT or (site.role in ("up", "gate_up") and site._replace(role=ACT) in self._rules)
            under = site.role != "down" and self._neuron_site(site) is not None
            self._other_masks[site] = ACT if gated else NEURONS if under else ""
        return self._other_masks[site]

    def _count_gated(self, site: Site, by_token: Tensor, act: Site) -> None:
        """Counts the rows that a mask at `act` keeps, of up and the columns of down, and of those rows kept columns."""
        assert self._decoder is not None
        rows = {under: part for under, part in self._decoder.rests_under_act(act).items() if under.role != "down"}
        free = self._under_act(act)
        if site.role == ACT:
            self._by_rows |= rows.keys()
            for under, part in free.items():  # others count for themselves
                self._read[under] = self._read[under] + _total(part * by_token + 1.0 - part)
        elif site not in rows:  # without a gate all rows are read
            self._read[site] = self._read[site] + _total(by_token)
            return
        for under in [s for s in rows if s not in free] if site.role == ACT else [site]:
            other = self._pending.pop(under, None)  # whichever comes first waits for the other
            if other is None:
                self._pending[under] = by_token
            else:
                kept, columns = (by_token, other) if site.role == ACT else (other, by_token)
                self._read[under] = self._read[under] + _total(columns * (rows[under] * kept + 1.0 - rows[under]))

    @property
    def tokens(self) -> int:
        """Gives the number of sparse tokens seen."""
        return self._tokens

    def site_sparsity(self) -> dict[Site, float]:
        """Gives the share of each matrix left unread, averaged over the tokens that come to it.

        What rules add is not in it, and experts that no token came to are not either.
        """
        return dict(self._measured()[0])

    def _measured(self) -> tuple[dict[Site, float], dict[Site, float]]:
        """Gives `site_sparsity`, and the share of tokens that come to each site."""
        if self._known is None:
            self._check()
            read, came = self._reads(), {site: self._came(site) for site in self._elements}
            shares = {s: 1.0 - read[s] / tokens if s in read else 0.0 for s, tokens in came.items() if tokens}
            counted = {site: s if self._counts(site, s) else 0.0 for site, s in shares.items()}
            self._known = counted, {site: tokens / self._tokens for site, tokens in came.items()}
        return self._known

    def byte_sparsity(self) -> float:
        """Gives the share of weight bytes that a sparse token leaves unread, less what rules and a transform add.

        The whole is what a token of the dense model reads of its blocks: of experts those that it goes through.
        """
        shares, came = self._measured()
        whole = self._always_read + sum(elements * came[site] for site, elements in self._elements.items())
        unread = sum(share * self._elements[site] * came[site] for site, share in shares.items())
        return (unread - self._added() - self._adapters) / whole

    def bits_read(self, codes: float = PLAIN_BITS, scales: float = 0.0) -> float:
        """Gives the bits that a sparse token reads, over the weights of all matrices of the blocks.

        What rules and a transform add, and what no rule can let rest, is read in `PLAIN_BITS`. Where an output rests
        (rows of gate and up), its codes do; scales lie by inputs, and are counted whole.

        Parameters
        ----------
        codes : float
            Bits of a weight of a block linear.
        scales : float
            Bits of its share of what a group of outputs has in common, beside them.

        Returns
        -------
        float
            Without arguments `PLAIN_BITS` times the share that is read.
        """
        shares, came = self._measured()
        whole = read = 0.0
        for site, elements in self._elements.items():
            tokens, share = came[site], shares.get(site, 0.0)
            of_scales = 1.0 if site in self._by_rows else 1.0 - share
            whole += tokens * elements
            read += tokens * elements * (codes * (1.0 - share) + scales * of_scales)
        plain = self._always_read + self._added() + self._adapters
        return (read + PLAIN_BITS * plain) / (whole + self._always_read)

    def _added(self) -> float:
        """Counts the elements that rules and neuron masks read beside the weights."""
        _, tokens = self._measured()
        added = sum(rule.extra_elements() * tokens.get(site, 1.0) for site, rule in self._rules.items())
        return added + sum(self._predictor(site, mask) for site, mask in self._neurons.items())

    def _predictor(self, site: Site, mask: NeuronMask) -> float:
        assert self._decoder is not None
        return mask.extra_elements(*self._decoder.mlp_shape(site))

    def _came(self, site: Site) -> int:
        """Counts the sparse tokens that came to `site`."""
        return self._tokens_at.get(site, 0) if site.is_expert else self._tokens

    def _counts(self, site: Site, share: float) -> bool:
        """Tells whether a share of zeros is one that counts: all are that a mask makes."""
        return site not in self._natural.sites or (site not in self._natural.few and share >= NATURAL)

    def _check(self) -> None:
        self._settle()
        if not self._tokens:
            raise SparsifierError("no sparse token was seen: byte sparsity is not defined")
        missed = {site.block: 0 for site in self._elements if site.is_expert}
        for site, tokens in self._tokens_at.items():
            if site.is_expert:
                missed.pop(site.block, None)
            elif tokens != self._tokens:
                raise SparsifierError(
                    f"the layer at {site} was called for {tokens} of {self._tokens} sparse tokens: byte sparsity is "
                    "defined where every token goes through every layer once"
                )
        if missed:
            raise SparsifierError(f"no sparse token came to an expert of block {next(iter(missed))}")


def _total(by_token: Tensor) -> float | Tensor:
    """Adds up; what a GPU computes is not waited for."""
    total = by_token.sum()
    return float(total) if by_token.device.type == "cpu" else total


def _values(found: Mapping[Key, float | Tensor]) -> dict[Key, float]:
    """Gives numbers for what lies on GPUs, in one transfer from each of them."""
    values = {key: float(value) for key, value in found.items() if not isinstance(value, Tensor)}
    by_device: dict[torch.device, dict[Key, Tensor]] = {}
    for key, value in found.items():
        if isinstance(value, Tensor):
            by_device.setdefault(value.device, {})[key] = value
    for tensors in by_device.values():
        values |= zip(tensors, torch.stack([value.double() for value in tensors.values()]).tolist())
    return values
