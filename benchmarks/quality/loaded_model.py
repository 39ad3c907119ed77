"""Loads what the cells of one model share: weights, calibration and dense passes, each at most once."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks import cache
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.identity import fit_setting, shared_version, tasks_version
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import ModelError
from resting.benchmarks.quality import bos, limits, perplexity
from resting.benchmarks.quality.tasks.evaluator import TaskEvaluator
from resting.benchmarks.quality.windows import Windows, windows_of
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    Calibration,
    DivergedError,
    OnProgress,
    Original,
    Sparsifier,
    Statistic,
    UnsupportedModelError,
)
from resting.sparsifier.batches import windows_per_forward
from resting.sparsifier.logits import check_logits
from resting.sparsifier.quantised.compensated import quantise_compensated
from resting.sparsifier.quantised.formats import Format


@dataclass
class LoadedModel:
    """Holds the model of a run, and what was computed on it.

    Everything is made on first use, so that a run whose cells are all cached loads nothing.

    Attributes
    ----------
    suite : Suite
    source : ModelSource
    device : str
    on_progress : callable
    needs : set of Statistic
        What the suite's methods need, gathered in one pass.
    """

    suite: Suite
    source: ModelSource
    device: str
    on_progress: OnProgress
    needs: frozenset[Statistic] = frozenset()
    _calibrated: dict[tuple[str | None, Original | None, str], CalibratedModel] = field(default_factory=dict)
    _references: dict[str, perplexity.DenseReference] = field(default_factory=dict)
    _diverged: DivergedError | None = None

    @cached_property
    def model(self) -> Any:
        """The dense model, whose logits are those of its final hidden states.

        Raises
        ------
        ModelError
            If it is not supported.
        DivergedError
            If its logits are not finite; again at every call, without another load.
        """
        if self._diverged is not None:
            raise self._diverged
        self.on_progress("load", 0, 1, self.source.name)
        model = self._load(self.suite.dtype)
        try:
            check_logits(model)
        except UnsupportedModelError as error:  # of the model and no method: no cell of it can be measured
            raise ModelError(f"{self.source.name} cannot be measured: {error}") from error
        except DivergedError as error:
            self._diverged = error
            raise
        return model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that belongs to the model."""
        return self.source.tokenizer()

    @cached_property
    def begins_with(self) -> list[str]:
        """The tokens that every window and prompt begins with."""
        return bos.shown(self.tokenizer, self.suite.bos)

    @cached_property
    def fit_setting(self) -> dict[str, Any]:
        """What determines a fitted plan beside the method and its cell: model, versions, calibration."""
        return fit_setting(self.suite, self.source, self.device)

    def calibrated(self, cell: Cell) -> CalibratedModel:
        """Return the calibrated model that the method of `cell` is fitted on."""
        return self.calibrated_for(cell.sparsifier, cell.config.text).under(cell.policy)

    def calibrated_for(self, method: Sparsifier | None, text: str | None = None) -> CalibratedModel:
        """Return the calibrated model under the suite's own token policy; of no method in particular where None."""
        original = method.original if method is not None and method.protocol == "original" else None
        key = (text, original, shared_version(method))
        if key not in self._calibrated:
            calibration = self._original(text, original) if original else self._calibration(text)
            # Files there are named by what determines their content, except for the code that computed it.
            folder = cache.root() / "fits" / key[2][:16]
            self._calibrated[key] = CalibratedModel(self.model, calibration, self.on_progress, folder, self.needs)
        return self._calibrated[key]

    def _calibration(self, text: str | None) -> Calibration:
        config = self.suite.calibration
        windows = self.windows(text or config.text, "calibration", config.window, config.windows)
        size = config.matching_window, config.matching_windows
        matching = [self.windows(t, "calibration", *size, seed=1).ids for t in config.matching_texts]
        return Calibration(
            _shuffled(windows.ids),
            statistics_windows=config.statistics_windows,
            matching=torch.cat(matching),
            tokens=self.suite.tokens.build(),
        )

    def _original(self, text: str | None, original: Original) -> Calibration:
        """The authors' size; windows are as long as the model and the text allow."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", original.window)
        length = min(original.window, limit)
        windows = self.windows(text or self.suite.calibration.text, "calibration", length, None)
        return Calibration(
            _shuffled(windows.ids)[: original.windows],
            statistics_windows=original.windows,
            tokens=original.tokens,
            statistics_tokens=AllButFirst(0),
            batch_size=1,
        )

    def windows(
        self, text: str, split: str, length: int, count: int | None, seed: int = 0, stride: int | None = None
    ) -> Windows:
        """Cut a text into windows that begin as the suite says (`windows_of`)."""
        own = self.suite.own(text)
        windows = windows_of(text, split, self.tokenizer, length, count, seed, self.suite.bos, stride, own)
        limits.check_ids([int(windows.ids.max())], self.model, self.tokenizer, text)
        return windows

    def reference(self, text: str) -> perplexity.DenseReference:
        """Return the dense pass over the evaluation windows of `text`."""
        if text not in self._references:
            config = self.suite.evaluation
            windows = self.windows(text, "evaluation", config.window, config.windows, stride=config.stride)
            size = windows_per_forward(config.batch_size, windows.ids.shape[1], self.model)
            self._references[text] = perplexity.DenseReference(self.model, windows.ids, size, text)
        return self._references[text]

    def make_room(self) -> None:
        """Leave a GPU's memory to what comes, training say."""
        for reference in self._references.values():
            reference.make_room()

    @cached_property
    def tasks(self) -> TaskEvaluator:
        """The suite's tasks on the model."""
        return self._tasks(self.model, self.suite.dtype)

    def tasks_in(self, dtype: str) -> TaskEvaluator:
        """Load the model in another dtype for this call, and return the suite's tasks on it."""
        return self._tasks(self._load(dtype), dtype)

    def _load(self, dtype: str) -> Any:
        return self.source.load(getattr(torch, dtype), self.device, self._compensate)

    def _compensate(self, model: Any, format: Format) -> None:
        """Quantise a model that is being loaded, on the suite's calibration text."""
        config, suite = self.suite.calibration, self.suite
        own = suite.own(config.text)
        windows = windows_of(
            config.text, "calibration", self.tokenizer, config.window, config.windows, 0, suite.bos, None, own
        )
        limits.check_ids([int(windows.ids.max())], model, self.tokenizer, config.text)
        calibration = Calibration(
            _shuffled(windows.ids),
            statistics_windows=config.statistics_windows,
            statistics_tokens=AllButFirst(0),  # the first one too, whose activations are far larger than all others
        )
        quantise_compensated(CalibratedModel(model, calibration, self.on_progress), format)

    def _tasks(self, model: Any, dtype: str) -> TaskEvaluator:
        assert self.suite.tasks is not None
        known = {key: self.fit_setting.get(key) for key in ("model", "device", "packages", "bos")}
        known |= {"dtype": dtype, "code": tasks_version()}
        if (format := Format.parse(self.source.weights)) is not None and format.compensated:
            # The dense model itself depends on the text that its codes were found on.
            known |= {key: self.fit_setting[key] for key in ("calibration", "texts")}
        return TaskEvaluator(model, self.tokenizer, self.suite.tasks, known, self.on_progress, self.suite.bos)


def _shuffled(windows: Tensor) -> Tensor:
    """Order `windows` by a seed: the first ones, which give the statistics, are then a sample of the whole text."""
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
