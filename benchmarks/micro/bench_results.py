"""Times what keeps and shows results: the store, a hundred thousand cells in it, their report, the page."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from resting.benchmarks.cells.cell import Result
from resting.benchmarks.page import build
from resting.benchmarks.report import sections
from resting.benchmarks.sweep.merge import merge
from resting.benchmarks.sweep.store import Store

RESULTS = Path(__file__).parents[2] / "results"
CELLS = 100_000
LINKS = 10_000
"""Files of the large store that are one file: file systems allow few more links."""


def result() -> Result:
    """A cell of two texts with their windows, as large as those of the default suite."""
    row = {"suite": "micro", "model": "m", "method": "teal", "target": 0.5, "seed": 0, "reason": None}
    metrics = [f"{text}_{name}" for text in ("wikitext2", "wikipedia") for name in ("perplexity", "kl")]
    rows = [row | {"metric": metric, "value": 12.345678, "stderr": 0.123456, "n": 4088} for metric in metrics]
    ratios = {f"{block}.{role}": 0.4775 for block in range(30) for role in ("q", "k", "v", "o", "gate", "up", "down")}
    return Result("done", rows, {metric: [1.234567] * 32 for metric in metrics}, info={"ratios": ratios})


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store of `CELLS` cells."""
    store = Store(tmp_path_factory.mktemp("many") / "cells")
    for number in range(CELLS):
        if number % LINKS == 0:
            first = store.path(f"{number:064x}")
            store.save(first.stem, result())
        else:
            store.path(f"{number:064x}").hardlink_to(first)
    return store


def bench_store_write(benchmark: Any, tmp_path: Path) -> None:
    benchmark.group = "store, one cell"
    store, number, found = Store(tmp_path / "cells"), count(), result()
    benchmark.pedantic(store.save, setup=lambda: ((f"{next(number):064x}", found), {}), rounds=500, warmup_rounds=5)


def bench_store_read(benchmark: Any, tmp_path: Path) -> None:
    benchmark.group = "store, one cell"
    store, number = Store(tmp_path / "cells"), count()
    for key in range(500):
        store.save(f"{key:064x}", result())
    benchmark.pedantic(store.finished, setup=lambda: ((f"{next(number) % 500:064x}",), {}), rounds=500)


def bench_list(benchmark: Any, many: Store) -> None:
    """The keys of all cells."""
    benchmark.group = "100,000 cells"
    assert benchmark.pedantic(lambda: len(list(many.keys())), rounds=5) == CELLS


def bench_read(benchmark: Any, many: Store) -> None:
    """Every cell read once, as a run does that finds all of them finished."""
    benchmark.group = "100,000 cells"

    def read() -> int:
        return sum(result is not None for result in map(many.finished, many.keys()))

    assert benchmark.pedantic(read, rounds=1) == CELLS


def bench_merge(benchmark: Any, many: Store) -> None:
    """Merged into a store that has them all, and found to be the same."""
    benchmark.group = "100,000 cells"
    assert benchmark.pedantic(merge, (many, [many.folder]), rounds=1).same == CELLS


def bench_report(benchmark: Any, tmp_path: Path) -> None:
    """Tables and plots of the default suite with so many seeds that it has as many cells, and one number per cell."""
    benchmark.group = "100,000 cells"
    folder = tmp_path / "baselines"
    shutil.copytree(RESULTS / "baselines", folder)
    frame = pd.read_csv(folder / "results.csv")
    frame = frame[frame.metric == "wikitext2_perplexity"]
    seeds = -(-CELLS // len(frame))
    pd.concat([frame.assign(seed=seed) for seed in range(seeds)]).to_csv(folder / "results.csv", index=False)
    facts = json.loads((folder / "provenance.json").read_text())
    for cell in facts["cells"]:
        cell.pop("ratios", None)
    facts["cells"] = [cell | {"seed": seed} for seed in range(seeds) for cell in facts["cells"]]
    (folder / "provenance.json").write_text(json.dumps(facts))
    benchmark.extra_info["rows"] = seeds * len(frame)
    benchmark.pedantic(sections.write, (folder,), rounds=1)
    assert (folder / "README.md").stat().st_size > 1000


def bench_page(benchmark: Any) -> None:
    """The page over all committed results."""
    benchmark.group = "page"
    page = benchmark.pedantic(build.render, (RESULTS,), rounds=1)
    benchmark.extra_info["bytes"] = len(page)
