"""What is timed: a model under plans, of real weights or of random ones in a published shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.assets import models, texts
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.identity import fit_setting
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import LatencyConfig, Suite
from resting.benchmarks.latency import random_models
from resting.benchmarks.progress import Console
from resting.benchmarks.quality import measure
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.sparsifier import CalibratedModel, Calibration, Compensated, Plan
from resting.sparsifier.fingerprint import declare
from resting.sparsifier.sites import ACT


@dataclass
class Subject:
    """A model, on a CPU with a second copy of it to be made sparse, and where its plans come from."""

    name: str
    dense: Any
    sparse: Any
    ids: Tensor
    """[1, prompt + decoded tokens + 1]: what is decoded."""
    bench: LoadedModel | None = None
    calibrated: CalibratedModel | None = None
    """Of random weights."""

    @classmethod
    def load(
        cls, suite: Suite, table: LatencyConfig, options: Options, spec: str, dtype: str, console: Console
    ) -> Subject:
        """Load `spec`, a model or the name of a shape."""
        length, kind, device = table.prompt + table.decoded_tokens + 1, getattr(torch, dtype), options.device
        copies = 2 if device == "cpu" else 1
        if spec in random_models.SHAPES:
            found = [random_models.random_model(spec, kind, device) for _ in range(copies)]
            size = found[0].config.vocab_size
            generator = torch.Generator().manual_seed(1)
            ids, windows = (torch.randint(3, size, shape, generator=generator) for shape in ((1, length), (3, 48)))
            calibrated = CalibratedModel(found[-1], Calibration(windows, batch_size=4))
            calibrated.factors = random_models.RandomFactors()
            return cls(random_models.name_of(spec), found[0], found[-1], ids.to(device), calibrated=calibrated)
        source = models.resolve(spec, console.say, console.bytes)
        needs = frozenset().union(*(cell.sparsifier.needs for cell in cells_of(suite)))
        bench = LoadedModel(suite, source, device, console.stage, needs, fit_setting(suite, source, device))
        ids = texts.windows("papers", "evaluation", bench.tokenizer, length, 1).ids
        found = [source.load(kind).to(device) for _ in range(copies)]
        return cls(source.name, found[0], found[-1], ids.to(device), bench)

    def bare(self, cell: Cell, plan: Plan) -> Plan | None:
        """What a method adds biases to: the same masks without them; None for other methods."""
        if not isinstance(cell.sparsifier, Compensated):
            return None
        return replace(plan, rules={site: replace(rule, bias=None) for site, rule in plan.rules.items()})

    @cached_property
    def third(self) -> Any:
        """One more copy, to be made sparse beside the second."""
        return copy.deepcopy(self.sparse)

    def declare(self) -> None:
        """Name the fingerprint of random weights again, after they were laid out anew."""
        if self.calibrated is not None:
            for model in (self.dense, self.sparse, vars(self).get("third")):
                if model is not None:
                    declare(model, self.name)

    def plan(self, cell: Cell) -> Plan:
        """The fitted plan; on random weights thresholds are fitted to the activations, and biases are random."""
        if self.bench is not None:
            return measure.fitted(self.bench, cell)
        assert self.calibrated is not None
        self.declare()
        method, inner = cell.sparsifier, cell.sparsifier
        while isinstance(inner, Compensated):
            inner = inner.inner
        plan = self.calibrated.plan(inner)
        if not isinstance(method, Compensated):
            return plan
        sites = getattr(method, "sites", ("down",))
        width = self.sparse.config.hidden_size
        biased = {
            site: replace(rule, bias=torch.randn(width) / 100)
            for site, rule in plan.rules.items()
            if site.role in sites and site.role in ("o", "down") and site.role != ACT
        }
        return replace(plan, rules=plan.rules | biased, method=cell.label)
