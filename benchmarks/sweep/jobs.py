"""A job of cells, (model, method): what one worker runs, with the weights loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from resting.benchmarks import provenance
from resting.benchmarks.assets import models
from resting.benchmarks.cells.cell import Cell, Result
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.identity import cell_key, fit_setting, run_setting
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.progress import Console
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.measure import measure, unmeasured
from resting.benchmarks.sweep.gpus import leased
from resting.benchmarks.sweep.run_cells import Mode, sweep
from resting.benchmarks.sweep.store import Store

_benches: dict[tuple[Any, ...], LoadedModel] = {}
"""The bench of the last job: jobs of one model that run in one process share weights and statistics."""


@dataclass(frozen=True)
class Job:
    """Cells of one method on one model; can be sent to another process or machine.

    Attributes
    ----------
    suite : Suite
    options : Options
    source : ModelSource
    missing : dict of str to str
        Texts and tasks that cannot be had, with the reason.
    label : str
        Of the method.
    mode : Mode
    threads : int
        Of torch, wherever the job runs: sums depend on it.
    only : set of str, optional
        Keys of the cells; all of the method's where None.
    store : Store, optional
        The default one where None.
    """

    suite: Suite
    options: Options
    source: models.ModelSource
    missing: dict[str, str]
    label: str
    mode: Mode
    threads: int = field(default_factory=torch.get_num_threads)
    only: frozenset[str] | None = None
    store: Store | None = None

    def only_cached(self) -> Job:
        """The same with nothing run."""
        return replace(self, mode=Mode.ONLY_CACHE)

    def cells(self) -> list[tuple[str, Cell]]:
        """Key and cell, in the order of the suite."""
        setting = run_setting(self.suite, self.source, self.options.device, self.missing)
        cells = [(cell_key(c, setting), c) for c in cells_of(self.suite, self.options.methods) if c.label == self.label]
        return [(key, cell) for key, cell in cells if self.only is None or key in self.only]

    def results(self, console: Console) -> Iterator[tuple[str, Cell, Result | None, bool]]:
        """Every cell with its result, and whether it was finished before; run here where it is not."""
        bench = self._bench(console)

        def run(cell: Cell) -> Result:
            return measure(bench, cell, self.missing)

        machine = partial(provenance.collect, self.options.device)
        store = self.store or Store.default()
        for key, cell, result, was_finished in sweep(self.cells(), store, run, self.mode, machine):
            if result is not None and "traceback" in result.info and not result.rows:
                unmeasured(bench, cell, result, f"{result.status}: {result.info['reason']}")
            yield key, cell, result, was_finished

    def _bench(self, console: Console) -> LoadedModel:
        key = (self.suite.model_dump_json(), self.source, self.options.device)
        if key not in _benches:
            _benches.clear()
            fixed = fit_setting(self.suite, self.source, self.options.device)
            cells = cells_of(self.suite, self.options.methods)
            needs = frozenset().union(*(cell.sparsifier.needs for cell in cells))
            _benches[key] = LoadedModel(self.suite, self.source, self.options.device, console.stage, needs, fixed)
        _benches[key].report = console.stage
        return _benches[key]


def jobs_of(
    suite: Suite, options: Options, sources: list[models.ModelSource], missing: dict[str, str], mode: Mode
) -> list[Job]:
    """All jobs of a suite, model by model and method by method."""
    labels = dict.fromkeys(cell.label for cell in cells_of(suite, options.methods))
    return [Job(suite, options, source, missing, label, mode) for source in sources for label in labels]


def run_job(job: Job) -> list[str]:
    """Run a job in this process, with nothing on the screen: the work of an executor's worker.

    Returns
    -------
    list of str
        Keys of its cells; results are in the store.
    """
    from resting.benchmarks.assets import texts

    torch.set_num_threads(job.threads)
    texts.provide(job.options.texts)
    with leased(job.options.device) as device:
        mine = replace(job, options=replace(job.options, device=device))
        return [key for key, *_ in mine.results(Console(quiet=True))]
