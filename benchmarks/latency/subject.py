"""What is timed: a model under plans, of real weights or of random ones in a published shape."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure, models, texts
from benchmarks.bench import Bench
from benchmarks.cells import Cell
from benchmarks.console import Console
from benchmarks.latency import shapes
from benchmarks.settings import Options, cells_of, fit_setting
from benchmarks.suite import LatencyTable, Suite
from sparsifier import Calibration, Compensated, Fitting, Plan
from sparsifier.fingerprint import declare
from sparsifier.sites import ACT


@dataclass
class Subject:
    """A model, on a CPU with a second copy of it to be made sparse, and where its plans come from."""

    name: str
    dense: Any
    sparse: Any
    ids: Tensor
    """[1, prompt + tokens + 1]: what is decoded."""
    bench: Bench | None = None
    fitting: Fitting | None = None
    """Of random weights."""

    @classmethod
    def load(
        cls, suite: Suite, table: LatencyTable, options: Options, spec: str, dtype: str, console: Console
    ) -> Subject:
        """Load `spec`, a model or the name of a shape."""
        length, kind, device = table.prompt + table.tokens + 1, getattr(torch, dtype), options.device
        copies = 2 if device == "cpu" else 1
        if spec in shapes.SHAPES:
            found = [shapes.random_model(spec, kind, device) for _ in range(copies)]
            size = found[0].config.vocab_size
            generator = torch.Generator().manual_seed(1)
            ids, windows = (torch.randint(3, size, shape, generator=generator) for shape in ((1, length), (3, 48)))
            fitting = Fitting(found[-1], Calibration(windows, batch_size=4))
            fitting.factors = shapes.RandomFactors()
            return cls(shapes.name_of(spec), found[0], found[-1], ids.to(device), fitting=fitting)
        source = models.resolve(spec, console.say, console.bytes)
        needs = frozenset().union(*(cell.sparsifier.needs for cell in cells_of(suite)))
        bench = Bench(suite, source, device, console.stage, needs, fit_setting(suite, source, device))
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
        if self.fitting is not None:
            for model in (self.dense, self.sparse, vars(self).get("third")):
                if model is not None:
                    declare(model, self.name)

    def plan(self, cell: Cell) -> Plan:
        """The fitted plan; on random weights thresholds are fitted to the activations, and biases are random."""
        if self.bench is not None:
            return measure.fitted(self.bench, cell)
        assert self.fitting is not None
        self.declare()
        method, inner = cell.sparsifier, cell.sparsifier
        while isinstance(inner, Compensated):
            inner = inner.inner
        plan = self.fitting.plan(inner)
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
