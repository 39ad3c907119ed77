"""A group of cells, (model, method): what one worker runs, with the weights loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks import models, provenance
from benchmarks.bench import Bench
from benchmarks.cells import Cell, Result
from benchmarks.console import Console
from benchmarks.measure import measure, unmeasured
from benchmarks.settings import Options, cells_of, fit_setting, setting_of
from benchmarks.suite import Suite
from benchmarks.sweep.engine import Mode, sweep
from benchmarks.sweep.gpus import leased
from benchmarks.sweep.store import Store

_benches: dict[tuple[Any, ...], Bench] = {}
"""The bench of the last group: groups of one model that run in one process share weights and statistics."""


@dataclass(frozen=True)
class Group:
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
        Of torch, wherever the group runs: sums depend on it.
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

    def only_cached(self) -> Group:
        """The same with nothing run."""
        return replace(self, mode=Mode.ONLY_CACHE)

    def cells(self) -> list[tuple[str, Cell]]:
        """Key and cell, in the order of the suite."""
        setting = setting_of(self.suite, self.source, self.options, self.missing)
        cells = [(c.key(setting), c) for c in cells_of(self.suite, self.options.methods) if c.label == self.label]
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

    def _bench(self, console: Console) -> Bench:
        key = (self.suite.model_dump_json(), self.source, self.options.device)
        if key not in _benches:
            _benches.clear()
            fixed = fit_setting(self.suite, self.source, self.options.device)
            cells = cells_of(self.suite, self.options.methods)
            needs = frozenset().union(*(cell.sparsifier.needs for cell in cells))
            _benches[key] = Bench(self.suite, self.source, self.options.device, console.stage, needs, fixed)
        _benches[key].report = console.stage
        return _benches[key]


def groups_of(
    suite: Suite, options: Options, sources: list[models.ModelSource], missing: dict[str, str], mode: Mode
) -> list[Group]:
    """All groups of a suite, model by model and method by method."""
    labels = dict.fromkeys(cell.label for cell in cells_of(suite, options.methods))
    return [Group(suite, options, source, missing, label, mode) for source in sources for label in labels]


def run_group(group: Group) -> list[str]:
    """Run a group in this process, with nothing on the screen: the work of an executor's worker.

    Returns
    -------
    list of str
        Keys of its cells; results are in the store.
    """
    from benchmarks import texts

    torch.set_num_threads(group.threads)
    texts.provide(group.options.texts)
    with leased(group.options.device) as device:
        mine = replace(group, options=replace(group.options, device=device))
        return [key for key, *_ in mine.results(Console(quiet=True))]
