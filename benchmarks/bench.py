"""What a run loads at most once: model, tokenizer, calibration, dense reference passes."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from benchmarks import perplexity, texts
from benchmarks.models import ModelSource
from benchmarks.suite import Suite
from sparsifier import Calibration, Fitting, Plan
from sparsifier.fitting import Report
from sparsifier.logits import check_logits, final_hidden


@dataclass
class Bench:
    """The model of a run, and what is measured on it.

    Everything is made on first use, so that a run whose cells are all cached loads nothing.
    """

    suite: Suite
    source: ModelSource
    device: str
    report: Report
    fit_setting: dict[str, Any] = field(default_factory=dict)
    """What determines a fitted plan beside the method: model, versions, calibration, policy."""
    masked_cost: float | None = None
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

    @cached_property
    def fitting(self) -> Fitting:
        table = self.suite.calibration
        windows = texts.windows(table.text, "calibration", self.tokenizer, table.window, table.windows)
        ids = windows.ids
        # The first windows give the statistics: a seeded order makes them a sample of the whole text.
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        matching = [
            texts.windows(t, "calibration", self.tokenizer, table.matching_window, table.matching_windows, seed=1).ids
            for t in table.matching_texts
        ]
        calibration = Calibration(
            ids[order],
            statistics_windows=table.statistics_windows,
            matching=torch.cat(matching),
            tokens=self.suite.tokens.build(),
        )
        return Fitting(self.model, calibration, self.report)

    def reference(self, text: str) -> perplexity.DenseReference:
        """The dense pass over the evaluation windows of `text`."""
        if text not in self._references:
            table = self.suite.evaluation
            windows = texts.windows(text, "evaluation", self.tokenizer, table.window, table.windows)
            self._references[text] = perplexity.DenseReference(self.model, windows.ids, table.batch_size)
        return self._references[text]

    @torch.no_grad()
    def masked_over_dense(self, plan: Plan, rounds: int = 5) -> float:
        """Time of a masked forward over that of a dense one: median of ratios taken in turn, in this process."""
        ids = self.fitting.calibration.windows[: self.fitting.calibration.batch_size].to(self.fitting.device)

        def seconds() -> float:
            begin = time.perf_counter()
            hidden = final_hidden(self.model, ids)
            float(hidden[0, 0, 0])  # waits for the device
            return time.perf_counter() - begin

        ratios = []
        for _ in range(rounds + 1):
            dense = seconds()
            with plan.applied(self.model, self.fitting.calibration.tokens):
                ratios.append(seconds() / dense)
        return statistics.median(ratios[1:])
