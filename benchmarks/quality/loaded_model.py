"""What a run loads at most once: model, tokenizer, calibration, dense reference passes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks import cache
from resting.benchmarks.assets import texts
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.identity import shared_version, tasks_version
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.quality import perplexity
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    Calibration,
    OnProgress,
    Original,
    Plan,
    Sparsifier,
    Statistic,
)
from resting.sparsifier.logits import check_logits, final_hidden


@dataclass
class LoadedModel:
    """The model of a run, and what is measured on it.

    Everything is made on first use, so that a run whose cells are all cached loads nothing.
    """

    suite: Suite
    source: ModelSource
    device: str
    report: OnProgress
    needs: frozenset[Statistic] = frozenset()
    """What the suite's methods need, gathered in one pass."""
    fit_setting: dict[str, Any] = field(default_factory=dict)
    """What determines a fitted plan beside the method and its cell: model, versions, calibration."""
    masked_cost: float | None = None
    _calibrated: dict[tuple[str | None, Original | None, str], CalibratedModel] = field(default_factory=dict)
    _references: dict[str, perplexity.DenseReference] = field(default_factory=dict)

    @cached_property
    def model(self) -> Any:
        self.report("load", 0, 1, self.source.name)
        model = self.source.load(getattr(torch, self.suite.dtype), self.device)
        check_logits(model)
        return model

    @cached_property
    def tokenizer(self) -> Any:
        return self.source.tokenizer()

    def calibrated(self, cell: Cell) -> CalibratedModel:
        """The calibration that the method of `cell` is fitted on, with what it already gave."""
        return self.calibrated_for(cell.sparsifier, cell.config.text).under(cell.policy)

    def calibrated_for(self, method: Sparsifier | None, text: str | None = None) -> CalibratedModel:
        """The same under the suite's own token policy; of no method in particular where None."""
        original = method.original if method is not None and method.protocol == "original" else None
        key = (text, original, shared_version(method))
        if key not in self._calibrated:
            calibration = self._original(text, original) if original else self._calibration(text)
            # Files there are named by what determines their content, except for the code that computed it.
            folder = cache.root() / "fits" / key[2][:16]
            self._calibrated[key] = CalibratedModel(self.model, calibration, self.report, folder, self.needs)
        return self._calibrated[key]

    def _calibration(self, text: str | None) -> Calibration:
        table = self.suite.calibration
        windows = texts.windows(text or table.text, "calibration", self.tokenizer, table.window, table.windows)
        matching = [
            texts.windows(t, "calibration", self.tokenizer, table.matching_window, table.matching_windows, seed=1).ids
            for t in table.matching_texts
        ]
        return Calibration(
            _shuffled(windows.ids),
            statistics_windows=table.statistics_windows,
            matching=torch.cat(matching),
            tokens=self.suite.tokens.build(),
        )

    def _original(self, text: str | None, original: Original) -> Calibration:
        """The authors' size; windows are as long as the model and the text allow."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", original.window)
        windows = texts.windows(
            text or self.suite.calibration.text, "calibration", self.tokenizer, min(original.window, limit), None
        )
        return Calibration(
            _shuffled(windows.ids)[: original.windows],
            statistics_windows=original.windows,
            tokens=original.tokens,
            statistics_tokens=AllButFirst(0),
            batch_size=1,
        )

    def reference(self, text: str) -> perplexity.DenseReference:
        """The dense pass over the evaluation windows of `text`."""
        if text not in self._references:
            table = self.suite.evaluation
            windows = texts.windows(text, "evaluation", self.tokenizer, table.window, table.windows)
            self._references[text] = perplexity.DenseReference(self.model, windows.ids, table.batch_size)
        return self._references[text]

    @cached_property
    def tasks(self) -> Any:
        """The suite's tasks (`TaskEvaluator`); lm-eval is imported only where there are some."""
        return self._tasks(self.model, self.suite.dtype)

    def tasks_in(self, dtype: str) -> Any:
        """The same for the dense model in another dtype, loaded for this call."""
        return self._tasks(self.source.load(getattr(torch, dtype), self.device), dtype)

    def _tasks(self, model: Any, dtype: str) -> Any:
        from resting.benchmarks.quality.tasks.evaluator import TaskEvaluator

        assert self.suite.tasks is not None
        known = {key: self.fit_setting.get(key) for key in ("model", "device", "packages")} | {
            "dtype": dtype,
            "code": tasks_version(),
        }
        return TaskEvaluator(model, self.tokenizer, self.suite.tasks, known, self.report)

    @torch.no_grad()
    def masked_over_dense(self, plan: Plan, calibrated: CalibratedModel, rounds: int = 5) -> float:
        """Time of a masked forward over that of a dense one: median of ratios taken in turn, in this process."""
        ids = calibrated.calibration.windows[:2].to(calibrated.device)

        def seconds() -> float:
            begin = time.perf_counter()
            hidden = final_hidden(self.model, ids)
            float(hidden[0, 0, 0])  # waits for the device
            return time.perf_counter() - begin

        ratios = []
        for _ in range(rounds + 1):
            dense = seconds()
            with plan.applied(self.model, calibrated.calibration.tokens):
                ratios.append(seconds() / dense)
        return statistics.median(ratios[1:])


def _shuffled(windows: Tensor) -> Tensor:
    """`windows` in a seeded order: the first ones, which give the statistics, are then a sample of the whole text."""
    return windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))]
