"""Keeps the state of sequences: what a prompt tells about the neurons that the tokens after it need."""

from __future__ import annotations

import torch
from torch import Tensor

from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import Selection, TokenPolicy
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import Sequence

LONG = 2**20
"""Tokens of a window in which every policy that has a prompt shows one."""


def has_prompt(policy: TokenPolicy) -> bool:
    """Tells whether a policy leaves a prompt dense, whose tokens are context."""
    return policy.context(LONG) > 0


def check_prompt(policy: TokenPolicy, method: str) -> None:
    """Refuses a policy that has no prompt for a mask that is made from one.

    Raises
    ------
    SparsifierError
    """
    if not has_prompt(policy):
        raise SparsifierError(
            f"{method} makes its neuron masks from a dense prompt, and the token policy {policy} leaves none; allowed: "
            "decode-only[:PROMPT] and last-fraction[:SHARE]"
        )


class PromptState:
    r"""Sums up what the prompt of each sequence says of the neurons of one MLP (GRIFFIN's statistic).

    .. math:: s_j = \Big\| \big( z_{tj} / \|z_t\|_2 \big)_{t \in prompt} \Big\|_2

    The prompt is the dense tokens of the policy, padding left out. With a cache it may come in pieces, and its state
    serves the later forwards of the same cache; a forward without past tokens begins anew.

    Parameters
    ----------
    site : Site
        For messages.
    scale : Tensor [neurons], optional
        Multiplies z first.

    Attributes
    ----------
    version : int
        Counts the forwards that had prompt tokens: the statistic of one version is the same.
    """

    def __init__(self, site: Site, scale: Tensor | None = None) -> None:
        self.site, self.scale = site, scale
        self.version = 0
        self._squares: Tensor | None = None
        self._length = 0
        self._sequence: Sequence | None = None

    def statistic(self, z: Tensor, selection: Selection, sequence: Sequence) -> Tensor:
        """Takes up the prompt tokens of `z` [batch, length, neurons] and gives the statistic, [batch, 1, neurons].

        Raises
        ------
        SparsifierError
            If it is not known which sequence the tokens belong to, or a sequence has sparse tokens and no prompt.
        """
        shape = selection.shape
        if shape is None or selection.packed or z.shape[:2] != shape:
            what = (
                "sequences packed into one row share no prompt"
                if selection.packed
                else "a part of a forward does not show its prompt"
            )
            raise SparsifierError(f"the neuron mask at {self.site} is made from a prompt, and {what}")
        known = self._known(selection, sequence)
        prompt, sparse = _prompt_of(selection, z.device)
        if known is not None and shape[0] > 1 and shape[1] == 1 and bool(prompt.any()):
            raise SparsifierError(
                f"the neuron mask at {self.site} is made from a prompt, which still grows token by token in a batch of "
                f"{shape[0]}, whose rows beam search exchanges; allowed: prompts as long as the policy's, in one "
                "forward or a few, or one sequence at a time"
            )
        squares = _squares(z, prompt, self.scale)
        if known is not None:
            squares = squares + known
        if bool((sparse.any(1) & ~(squares > 0).any(1)).any()):
            raise SparsifierError(
                f"the neuron mask at {self.site} is made from a prompt, and a sequence has sparse tokens without one"
            )
        if selection.counted:  # and not the repetition of an earlier forward
            self._squares = squares.detach()
            self.version += int(bool(prompt.any()))
            self._moved(selection, sequence)
        return squares.sqrt()[:, None]

    def step(self, selection: Selection, sequence: Sequence) -> Tensor:
        """Gives the statistic, [batch, 1, neurons], for a forward of sparse tokens alone, whose z nobody computes.

        Raises
        ------
        SparsifierError
            As `statistic`.
        """
        known = self._known(selection, sequence)
        if known is None:
            raise SparsifierError(
                f"the neuron mask at {self.site} is made from a prompt, and a sequence has sparse tokens without one"
            )
        self._moved(selection, sequence)
        return known.sqrt()[:, None]

    def _moved(self, selection: Selection, sequence: Sequence) -> None:
        assert selection.shape is not None
        self._length = selection.past + selection.shape[1]
        self._sequence = sequence

    def _known(self, selection: Selection, sequence: Sequence) -> Tensor | None:
        """Gives the sums over earlier forwards of the same sequences; None at their beginning."""
        if not selection.past:
            return None
        assert selection.shape is not None
        seen, batch = self._squares, selection.shape[0]
        other = self._sequence is None or not self._sequence.is_that_of(sequence)
        if seen is None or other or selection.past != self._length:
            raise SparsifierError(
                f"the neuron mask at {self.site} is made from a prompt, and the cache holds {selection.past} tokens "
                f"that did not all come through this plan in one sequence of forwards"
            )
        if len(seen) != batch:
            raise SparsifierError(
                f"the neuron mask at {self.site} is made from the prompts of {len(seen)} sequences, and the batch has "
                f"{batch} now: it must stay as it is"
            )
        return seen


def _prompt_of(selection: Selection, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tells the prompt tokens and the sparse ones, both [batch, length]."""
    assert selection.shape is not None
    if selection.sparse is None:
        sparse = torch.ones(selection.shape, dtype=torch.bool, device=device)
        sparse[:, : selection.dense] = False
    else:
        sparse = selection.sparse.to(device)
    real = torch.ones_like(sparse) if selection.real is None else selection.real.to(device)
    return real & ~sparse, sparse


def _squares(z: Tensor, tokens: Tensor, scale: Tensor | None) -> Tensor:
    """Sums ``(z_tj / ||z_t||)^2`` over `tokens` [batch, length]: [batch, neurons]."""
    return torch.stack([token_shares(row[wanted], scale).sum(0) for row, wanted in zip(z, tokens)])


def token_shares(z: Tensor, scale: Tensor | None = None) -> Tensor:
    """Computes ``z_tj^2 / ||z_t||^2`` of `z` [tokens, neurons], times `scale` first; a token of zeros has shares of 0.

    In fp32, from entries over the largest of their token, whose squares overflow in no dtype.
    """
    z = z.float()
    z = z if scale is None else z * scale
    z = z / z.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    squares = z.square()
    return squares / squares.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
