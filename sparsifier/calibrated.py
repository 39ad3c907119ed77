"""Holds the model that a sparsifier is fitted on, its calibration text, and all that was computed from them."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from resting.sparsifier import fingerprint
from resting.sparsifier.batches import windows_per_forward
from resting.sparsifier.calibration import Calibration
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import DivergedError
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.logits import final_hidden
from resting.sparsifier.low_rank import Factors
from resting.sparsifier.mask_functions import THRESHOLD
from resting.sparsifier.meter import Meter
from resting.sparsifier.plan import Plan
from resting.sparsifier.policy import TokenPolicy
from resting.sparsifier.progress import OnProgress, silent
from resting.sparsifier.sites import Site
from resting.sparsifier.statistics import Statistic, Statistics
from resting.sparsifier.transform import Transform, explicit
from resting.sparsifier.weights import check_weights

T = TypeVar("T")


class CalibratedModel:
    """Shares statistics, teacher states and fitted plans between the methods and targets of one model.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        Dense and not quantised; it is left as it was.
    calibration : Calibration
    on_progress : OnProgress, optional
        Is told of progress.
    folder : Path, optional
        Where training keeps its checkpoints, so that a killed run continues, and where decompositions of weights are
        kept; without it nothing is written.
    needs : set of Statistic
        Gathered in the first pass, whichever method comes first.
    """

    def __init__(
        self,
        model: Any,
        calibration: Calibration,
        on_progress: OnProgress = silent,
        folder: Path | None = None,
        needs: frozenset[Statistic] = frozenset(),
    ) -> None:
        self.model = model
        self.calibration = calibration
        self.on_progress = on_progress
        self.folder = folder
        self.needs = needs
        self.decoder = Decoder.of(model)
        check_weights(self.decoder)
        self.factors = Factors(None if folder is None else folder / "svd")
        self.cached: dict[str, Any] = {}
        """Whatever methods want to share, by a key of theirs (SPON: the teacher's hidden states)."""
        self.plans: dict[tuple[Any, ...], Plan] = {}
        """Fitted plans under the token policy of `calibration`, kept here by `Sparsifier.plan_for`."""
        self._statistics: dict[tuple[str, frozenset[Statistic]], Statistics] = {}
        self._under: dict[str, CalibratedModel] = {}
        self.transform: Transform | None = None
        """The transform that is on the model while a method is fitted: statistics and weights are those under it."""
        self._rewritten: list[CalibratedModel] = []

    @property
    def device(self) -> torch.device:
        """Gives the device of the model's weights."""
        return next(self.model.parameters()).device

    @property
    def setting(self) -> list[str]:
        """Names what else than weights and text decides on computed values, for the names of files."""
        return [str(next(self.model.parameters()).dtype), self.device.type, torch.__version__]

    @property
    def model_fingerprint(self) -> str:
        """Gives the hash of the model's weights (`fingerprint.of_model`)."""
        return fingerprint.of_model(self.model)

    @property
    def identity(self) -> tuple[str, str]:
        """Gives the fingerprint of the model and the digest of the text, which a plan names."""
        return self.model_fingerprint, self.calibration.digest

    def under(self, tokens: TokenPolicy) -> CalibratedModel:
        """Gives this model, text and statistics with byte targets met under another token policy."""
        if str(tokens) == str(self.calibration.tokens):
            return self
        if str(tokens) not in self._under:
            other = copy.copy(self)  # statistics and what methods share stay common
            other.calibration = replace(self.calibration, tokens=tokens)
            other.plans = {}
            other._under = {str(self.calibration.tokens): self}
            self._under[str(tokens)] = other
        return self._under[str(tokens)]

    def plan(self, method: Any, fit: Callable[[], Plan]) -> Plan:
        """Gives the plan that is kept of `method`, or what `fit` makes of the model in evaluation mode.

        Methods are told apart by their parameters and by their classes: a subclass that keeps its parent's name is
        another method.
        """
        key = (json.dumps(method.spec(), sort_keys=True), *_classes(method))
        if key not in self.plans:
            with evaluating(self.model):
                self.plans[key] = fit()
        return self.plans[key]

    def rewritten(self, find: Callable[[CalibratedModel], Transform | None], fit: Callable[[CalibratedModel], T]) -> T:
        """Gives what `fit` makes of this model under the transform that `find` gives.

        Without one, or inside one already, `fit` gets this model as it is. Else it gets a calibrated model of the
        same text, with the transform on: its statistics, weights and measured bytes are those of the rewritten model,
        and its plans carry the transform and belong to the model as it was. All that fits under one transform shares
        it.
        """
        if self.transform is not None or (transform := find(self)) is None:
            return fit(self)
        found = next((known for known in self._rewritten if known.transform is transform), None)
        if found is None:
            arguments = (self.calibration, self.on_progress, self.folder, self.needs - {Statistic.GRAM})
            found = CalibratedModel(self.model, *arguments)
            found.transform, found.factors = transform, self.factors
            self._rewritten.append(found)
        with explicit(transform, self.model, self.decoder):
            return fit(found.under(self.calibration.tokens))

    def grams(self, sites: list[Site]) -> dict[Site, Tensor]:
        """Gathers the second moments [in, in] of what `sites` read, in fp64; not kept, since they are large."""
        grams = Statistics.grams(self.model, self.calibration, sites, self.on_progress)
        return {site: gram.second_moment for site, gram in grams.items()}

    def statistics(self, needs: frozenset[Statistic]) -> Statistics:
        """Gathers the dense model's statistics, on the first call that needs them."""
        policy = str(self.calibration.statistics_policy)
        for (known_policy, gathered), statistics in self._statistics.items():
            if known_policy == policy and needs <= gathered:
                return statistics
        gathered = needs | self.needs
        self._statistics[policy, gathered] = Statistics.collect(
            self.model, self.calibration, gathered, self.on_progress, self.factors
        )
        return self._statistics[policy, gathered]

    def scored(
        self,
        needs: frozenset[Statistic],
        scales: Mapping[Site, Tensor],
        centres: Mapping[Site, Tensor] | None = None,
        mask: str = THRESHOLD,
    ) -> Statistics:
        """Adds histograms of ``scale * |x - centre|`` at the sites of `scales` to `statistics`, in one pass.

        With `mask`, they are of the levels that this mask function gives them. Equal ones are gathered once.
        """
        statistics, centres = self.statistics(needs), centres or {}
        if not scales:
            return statistics
        vectors = [f"{site}{fingerprint.of_tensor(t)}" for of in (scales, centres) for site, t in of.items()]
        digest = hashlib.sha256(",".join(vectors).encode())
        names = sorted(need.value for need in needs)
        key = f"scored {mask} {self.calibration.statistics_policy} {names} {len(scales)} {digest.hexdigest()}"
        if key not in self.cached:
            self.cached[key] = statistics.scored(self.model, self.calibration, scales, self.on_progress, centres, mask)
        return self.cached[key]

    @torch.no_grad()
    def measure(self, plan: Plan) -> float:
        """Measures the byte sparsity of `plan` on the matching windows, under the calibration's token policy.

        Raises
        ------
        DivergedError
            If the sparse model's hidden states are NaN or infinite: such inputs count as read.
        """
        meter = Meter()
        windows = self.calibration.windows if self.calibration.matching is None else self.calibration.matching
        at_once = windows_per_forward(self.calibration.batch_size, windows.shape[1], self.model)
        finite = []
        with evaluating(self.model), plan.applied(self.model, self.calibration.policy(windows), meter):
            for ids, mask in self.calibration.matching_batches(at_once):
                mask = None if mask is None else mask.to(self.device)
                hidden = final_hidden(self.model, ids.to(self.device), mask)
                finite.append(torch.isfinite(hidden).all())  # looked up at the end: until then a GPU is not waited for
        if not all(map(bool, finite)):
            raise DivergedError(
                f"hidden states of the model under {plan.method} at {plan.target:g} are NaN or infinite "
                "on the calibration text"
            )
        return meter.byte_sparsity()


def _classes(method: Any) -> Iterator[type]:
    """Yields the class of `method`, and those of the methods that it wraps."""
    yield type(method)
    for value in vars(method).values():
        if hasattr(value, "plan_for"):
            yield from _classes(value)
