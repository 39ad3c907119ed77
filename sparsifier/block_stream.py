"""Carries calibration text through a model block by block, so that what is decided at one block acts on the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.errors import DivergedError, UnsupportedModelError
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.installing import installed
from resting.sparsifier.logits import final_hidden
from resting.sparsifier.policy import Selection
from resting.sparsifier.roles import INPUT_OF
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker

Rules = Mapping[Site, Rule]
Decide = Callable[[Site, Tensor], Rule]
"""Makes the rule of a site from its inputs [tokens, in], those of sparse tokens."""


class BlockStream:
    """Holds what goes into one block, for all statistics windows: at first into block 0, as the dense model has it.

    Parameters
    ----------
    calibrated : CalibratedModel

    Raises
    ------
    UnsupportedModelError
        If the model has experts, or hands more from block to block than hidden states.
    """

    @torch.no_grad()
    def __init__(self, calibrated: CalibratedModel) -> None:
        self.calibrated, self.decoder = calibrated, calibrated.decoder
        expert = next((site for site in self.decoder.slots if site.is_expert), None)
        if expert is not None:
            raise UnsupportedModelError(
                f"inputs are not carried from block to block in a model with experts, as at {expert}: its tokens part"
            )
        self.block = 0
        self._hidden: list[Tensor] = []
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self._selections: list[Selection] = []
        self._policy = calibrated.calibration.statistics_policy_for(calibrated.calibration.windows)
        for ids, mask in calibrated.calibration.statistics_batches():
            mask = None if mask is None else mask.to(calibrated.device)
            self._selections.append(Selection.of(self._policy, len(ids), ids.shape[1], 0, mask))
            self._see_calls(ids.to(calibrated.device), mask)
        self._check()

    def _see_calls(self, ids: Tensor, mask: Tensor | None) -> None:
        """Runs the dense model once, and keeps with what each block is called beside hidden states."""
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            if not calls:
                self._hidden.append(hidden)
            calls.append((args[1:], kwargs))

        with ExitStack() as stack:
            stack.enter_context(evaluating(self.calibrated.model))
            for layer in self.decoder.layers:
                stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
            if not self._calls:
                stack.callback(self.decoder.layers[-1].register_forward_hook(self._see_last).remove)
            final_hidden(self.calibrated.model, ids, mask)
        if len(calls) != self.decoder.blocks or self._hidden[-1].dim() != 3:
            raise UnsupportedModelError("inputs are not carried from block to block: a forward calls blocks otherwise")
        self._calls.append(calls)

    def _see_last(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._last = _hidden_of(output)

    @torch.no_grad()
    def _check(self) -> None:
        """Makes sure, on the first batch, that blocks one after another give what the model gives."""
        first = self._hidden[0]
        for block in range(self.decoder.blocks):
            self.block = block
            self._hidden[0] = self._run(0, {})
        worst = float((self._hidden[0] - self._last).abs().max())
        self.block, self._hidden[0] = 0, first
        if not worst <= 1e-3 * float(self._last.abs().max()):
            raise UnsupportedModelError(
                "inputs are not carried from block to block: blocks one after another give something else than the "
                f"model, off by {worst:.2g}"
            )
        del self._last

    def inputs(self, sites: Sequence[Site], rules: Rules) -> Iterator[dict[Site, Tensor]]:
        """Runs the present block under `rules`, and yields the inputs of `sites`, batch by batch.

        Parameters
        ----------
        sites : sequence of Site
            Of the present block. Those that read one tensor through one module get it once each.
        rules : mapping of Site to Rule
            Of the present block; what `rules` does at a site is not yet done to its input.

        Yields
        ------
        dict of Site to Tensor [tokens, in]
            Of the sparse tokens.
        """
        for batch, selection in enumerate(self._selections):
            seen: dict[Site, Tensor] = {}

            def see(site: Site, x: Tensor, seen: dict[Site, Tensor] = seen, selection: Selection = selection) -> None:
                seen[site] = selection.take(x)
                if not bool(torch.isfinite(seen[site]).all()):
                    raise DivergedError(f"inputs at {site} are NaN or infinite on the calibration text")

            self._run(batch, rules, sites, see)
            yield seen

    def advance(self, rules: Rules) -> None:
        """Goes on to the next block, with what the present one gives under `rules`."""
        for batch in range(len(self._hidden)):
            self._hidden[batch] = self._run(batch, rules)
        self.block += 1

    @torch.no_grad()
    def _run(
        self, batch: int, rules: Rules, sites: Sequence[Site] = (), see: Callable[[Site, Tensor], None] | None = None
    ) -> Tensor:
        layer = self.decoder.layers[self.block]
        args, kwargs = self._calls[batch][self.block]
        tracker = TokenTracker.fixed(self._policy, self._selections[batch])
        mine = {site: rule for site, rule in rules.items() if site.block == self.block}
        with ExitStack() as stack:
            stack.enter_context(evaluating(layer))
            layers = stack.enter_context(installed(self.decoder, mine, tracker))
            for site in sites:
                module: Any = layers.get(site, self.decoder.slots[site].module)
                assert see is not None

                def show(module: nn.Module, args: tuple[Any, ...], site: Site = site) -> None:
                    see(site, args[0])

                stack.callback(module.register_forward_pre_hook(show).remove)
            output = layer(self._hidden[batch], *args, **kwargs)
        return _hidden_of(output)


def _hidden_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def stages(sites: Sequence[Site]) -> list[list[Site]]:
    """Divides the sites of a block by the tensor that they read, in the order in which a block computes these."""
    order = ("attention", "q_b", "kv_b", "o", "mlp", "down")
    reads = sorted({INPUT_OF[site.role] for site in sites}, key=order.index)
    return [[site for site in sites if INPUT_OF[site.role] == of] for of in reads]


def progressively(
    calibrated: CalibratedModel, sites: Sequence[Site], decide: Decide, masked: bool = True
) -> dict[Site, Rule]:
    """Decides the rules of `sites` one after another, each from inputs that the rules before it have already changed.

    Blocks come in turn, and in a block what its layers read: attention, o, gate and up, down. Every tensor takes one
    more run of its block, and its numbers are in memory all at once.

    Parameters
    ----------
    calibrated : CalibratedModel
    sites : sequence of Site
        Of linear layers.
    decide : callable
        From a site and its inputs [tokens, in], of all statistics windows' sparse tokens, to its rule.
    masked : bool
        With False inputs are those of the dense model.

    Raises
    ------
    UnsupportedModelError
        As `BlockStream`.
    DivergedError
        If inputs are NaN or infinite.
    """
    stream = BlockStream(calibrated)
    rules: dict[Site, Rule] = {}
    for block in range(calibrated.decoder.blocks):
        groups = stages([site for site in sites if site.block == block])
        for together in [[group] for group in groups] if masked else [groups]:
            batches = list(stream.inputs([group[0] for group in together], rules if masked else {}))
            for group in together:
                inputs = torch.cat([batch.pop(group[0]) for batch in batches])
                rules |= {site: decide(site, inputs) for site in group}
        stream.advance(rules if masked else {})
        calibrated.on_progress("block by block", block + 1, calibrated.decoder.blocks, "blocks")
    return {site: rules[site] for site in sites}
