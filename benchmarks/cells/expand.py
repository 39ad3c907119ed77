"""Expands a suite into cells: every method at every target, seed and token policy."""

from __future__ import annotations

from collections.abc import Mapping

from resting.benchmarks.cells import registry
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.suite import MethodConfig, Suite
from resting.benchmarks.errors import SuiteError
from resting.sparsifier import Compensated, Sparsifier, TokenPolicy


def cells_of(suite: Suite, outside: tuple[type[Sparsifier], ...] = ()) -> list[Cell]:
    """Return all cells of a suite on one model, method by method; refuse unknown methods and parameters.

    A method without a seed has one cell a target, whatever the suite's seeds. Cells under further token policies come
    last; each policy has its own dense cell, since it decides what is scored.
    """
    extra = {cls.name: cls for cls in outside}
    added = [f"{name}(teal)" if issubclass(cls, Compensated) else name for name, cls in extra.items()]
    tables = [*suite.methods, *(MethodConfig(name=n) for n in added if n not in {m.name for m in suite.methods})]
    cells = [c for t in tables for c in _cells(suite, t, t.targets or suite.targets, suite.tokens.build(), extra)]
    for policy in suite.policies:
        for table in tables:
            wanted = policy.methods is None or table.name in policy.methods or table.name == "dense"
            if wanted and table.parameters.get("protocol") != "original":  # that one has its own policy
                cells += _cells(suite, table, policy.targets, policy.build(), extra)
    known: dict[str, MethodConfig] = {}
    for cell in cells:
        if known.setdefault(cell.label, cell.config) is not cell.config:
            raise SuiteError(f"two methods are called {cell.label!r}: give one a label")
    return cells


def _cells(
    suite: Suite,
    table: MethodConfig,
    targets: list[float],
    tokens: TokenPolicy,
    extra: Mapping[str, type[Sparsifier]],
) -> list[Cell]:
    cells = []
    for target in [0.0] if table.name == "dense" else targets:
        built = registry.build(table.name, target, table.parameters, extra, table.inner)
        if built.original is not None and built.protocol == "original":
            tokens = built.original.tokens
        if not built.has_seed:
            cells.append(Cell(table, built, suite.seeds[0], tokens))
            continue
        for seed in table.seeds or suite.seeds:
            parameters = table.parameters | {"seed": seed}
            seeded = registry.build(table.name, target, parameters, extra, table.inner)
            cells.append(Cell(table, seeded, seed, tokens))
    return cells
