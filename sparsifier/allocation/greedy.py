"""Lets bytes rest where a block's output feels it least, step by step (TEAL, arXiv 2408.14690, algorithm 1)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.allocation.slope import in_blocks
from resting.sparsifier.allocation.uniform import coverage, uniform
from resting.sparsifier.calibrated import CalibratedModel
from resting.sparsifier.errors import DivergedError, TargetUnreachableError
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.files import replacing
from resting.sparsifier.installing import installed
from resting.sparsifier.logits import final_hidden
from resting.sparsifier.policy import Selection, TokenPolicy
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker

MakeRule = Callable[[Site, float], Rule]


@dataclass
class Step:
    """Stores a point of a block's path: the byte sparsity of the block, and the ratio of each role (`Site.group`)."""

    sparsity: float
    ratios: dict[str, float]


@dataclass(frozen=True)
class GreedySearch:
    """Sets the step, the text and the tokens of the greedy search.

    Attributes
    ----------
    step : float
        Share of a block's weight bytes that rests with every step. The authors step by 0.05 of q, which is 0.0041 of a
        Llama-2-7B block and 0.0047 of one of SmolLM2-135M.
    windows, window : int
        Calibration windows whose dense block inputs are kept, and how many of their first tokens.
    tokens : TokenPolicy
        Sparse tokens.
    measured : float
        Last share of the positions at which the error is measured, among those that are sparse.
    """

    step: float
    windows: int
    window: int
    tokens: TokenPolicy
    measured: float = 1.0


class BlockGreedy:
    """Finds the greedy paths of all blocks of a model, as far as targets ask.

    Every block has the same byte sparsity. In a block, the role that raises the block's error least by resting one
    more step of bytes is taken, again and again.

    Parameters
    ----------
    calibrated : CalibratedModel
    rule : callable
        From site and ratio to rule.
    roles : tuple of str
    search : GreedySearch
    name : str
        What tells `rule` from others; names the file in which paths are kept.
    """

    def __init__(
        self, calibrated: CalibratedModel, rule: MakeRule, roles: tuple[str, ...], search: GreedySearch, name: str
    ) -> None:
        self.calibrated, self.rule, self.roles, self.search = calibrated, rule, roles, search
        self.decoder = calibrated.decoder
        self._inputs: list[tuple[tuple[Any, ...], dict[str, Any]]] | None = None
        self._dense: dict[int, Tensor] = {}
        self._chosen: dict[tuple[int, float], dict[Site, float]] = {}
        self._file = self._path_file(name)
        self._groups: dict[int, dict[str, list[Site]]] = {}
        for site in self.decoder.sites(roles):
            self._groups.setdefault(site.block, {}).setdefault(site.group, []).append(site)
        self.paths = {block: [Step(0.0, dict.fromkeys(groups, 0.0))] for block, groups in self._groups.items()}
        self._read()

    def ratios(self, nominal: float | Mapping[int, float]) -> dict[Site, float]:
        """Gives the ratio at each site at which every block has a byte sparsity of `nominal`, or of its own in it.

        Between two steps of the path ratios are interpolated. Where a block's error would be above that of uniform
        ratios (a step is not small), the block gets those.

        Raises
        ------
        TargetUnreachableError
            If the roles cannot leave so many bytes unread.
        """
        if isinstance(nominal, Mapping):
            wanted, even = dict(nominal), in_blocks(self.decoder, self.roles, nominal)
        else:
            wanted = dict.fromkeys(self.paths, nominal)
            even = uniform(self.decoder, self.roles, nominal)
        for block in self.paths:
            self._extend(block, wanted[block])
            self.calibrated.on_progress("greedy allocation", block + 1, self.decoder.blocks, "blocks")
        return {site: ratio for block in self.paths for site, ratio in self._choose(block, wanted[block], even).items()}

    def _choose(self, block: int, nominal: float, even: dict[Site, float]) -> dict[Site, float]:
        if (block, nominal) not in self._chosen:
            mine = self._by_site(block, self._interpolated(block, nominal))
            flat = {site: even[site] for site in mine}
            self._chosen[block, nominal] = mine if self.error(block, mine) <= self.error(block, flat) else flat
        return self._chosen[block, nominal]

    def _by_site(self, block: int, ratios: dict[str, float]) -> dict[Site, float]:
        return {site: ratio for group, ratio in ratios.items() for site in self._groups[block][group]}

    def _interpolated(self, block: int, nominal: float) -> dict[str, float]:
        path = self.paths[block]
        after = next(i for i, step in enumerate(path) if step.sparsity >= nominal - 1e-12)
        if after == 0:
            return dict(path[0].ratios)
        low, high = path[after - 1], path[after]
        share = min(1.0, (nominal - low.sparsity) / (high.sparsity - low.sparsity))
        return {role: low.ratios[role] + share * (high.ratios[role] - low.ratios[role]) for role in low.ratios}

    def _extend(self, block: int, nominal: float) -> None:
        path = self.paths[block]
        total = self.decoder.elements_in(block)
        groups = self._groups[block]
        weights = {role: sum(coverage(self.decoder, site) for site in sites) / total for role, sites in groups.items()}
        grew = False
        while path[-1].sparsity < nominal - 1e-12:
            here = path[-1].ratios
            options = [
                here | {role: min(1.0, here[role] + self.search.step / weights[role])}
                for role in groups
                if here[role] < 1.0
            ]
            if not options:
                raise TargetUnreachableError(f"byte sparsity {nominal:g} is above what block {block} can leave unread")
            errors = [self.error(block, self._by_site(block, option)) for option in options]
            best = options[min(range(len(options)), key=errors.__getitem__)]
            path.append(Step(sum(weights[role] * ratio for role, ratio in best.items()), best))
            grew = True
        if grew:
            self._write()

    @torch.no_grad()
    def error(self, block: int, ratios: dict[Site, float]) -> float:
        """Measures the error of one block on the dense model's inputs to it.

        The L2 norm along the sequence of the difference of its output to the dense block's, averaged over windows
        and channels.

        Raises
        ------
        DivergedError
            If it is NaN or infinite, which no other error can be compared with.
        """
        if block not in self._dense:
            self._dense[block] = self._run(block)
        rules = {site: self.rule(site, ratio) for site, ratio in ratios.items()}
        batch, length = self._windows().shape
        selection = Selection.of(self.search.tokens, batch, length, 0, self._mask())
        tracker = TokenTracker.fixed(self.search.tokens, selection)
        with installed(self.decoder, rules, tracker):
            difference = self._run(block).float() - self._dense[block].float()
        first = max(selection.dense, round((1.0 - self.search.measured) * length))
        if selection.sparse is not None:
            difference = difference * selection.sparse[..., None]
        error = float(difference[..., first:, :].norm(dim=-2).mean())
        if not math.isfinite(error):
            raise DivergedError(f"the error of block {block} is {error} when some of its inputs rest")
        return error

    def _run(self, block: int) -> Tensor:
        args, kwargs = self._block_inputs()[block]
        with evaluating(self.decoder.layers[block]):
            output = self.decoder.layers[block](*args, **kwargs)
        return output[0] if isinstance(output, tuple) else output

    def _windows(self) -> Tensor:
        return self.calibrated.calibration.windows[: self.search.windows, : self.search.window]

    def _mask(self) -> Tensor | None:
        mask = self.calibrated.calibration.attention_mask
        return None if mask is None else mask[: self.search.windows, : self.search.window].to(self.calibrated.device)

    @torch.no_grad()
    def _block_inputs(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        if self._inputs is None:
            seen: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

            def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs.pop("hidden_states")
                seen.append(((hidden, *args[1:]), kwargs))

            handles = [
                layer.register_forward_pre_hook(lambda m, a, k: keep(m, a, dict(k)), with_kwargs=True)
                for layer in self.decoder.layers
            ]
            try:
                with evaluating(self.calibrated.model):
                    final_hidden(self.calibrated.model, self._windows().to(self.calibrated.device), self._mask())
            finally:
                for handle in handles:
                    handle.remove()
            self._inputs = seen
        return self._inputs

    def _path_file(self, name: str) -> Path | None:
        if self.calibrated.folder is None:
            return None
        settings = asdict(self.search) | {"tokens": str(self.search.tokens), "roles": self.roles, "name": name}
        calibrated = self.calibrated
        identity = [calibrated.model_fingerprint, calibrated.setting, calibrated.calibration.training_digest, settings]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        return self.calibrated.folder / "greedy" / f"{key}.json"

    def _read(self) -> None:
        try:
            stored = json.loads(self._file.read_text()) if self._file is not None else {}
            self.paths |= {int(block): [Step(**step) for step in path] for block, path in stored.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            return  # not there yet, or damaged: searched again

    def _write(self) -> None:
        if self._file is None:
            return
        with replacing(self._file) as temporary:
            temporary.write_text(json.dumps({b: [asdict(s) for s in path] for b, path in self.paths.items()}))
