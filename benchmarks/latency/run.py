"""`resting run` of a suite that measures time: matrices, then models, on this machine."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from benchmarks import cache, measure, models, provenance, texts
from benchmarks.bench import Bench
from benchmarks.cells import Cell
from benchmarks.console import Console
from benchmarks.errors import SuiteError
from benchmarks.latency import decode, matrices, report, shapes, timing
from benchmarks.runner import Options, cells_of, fit_setting
from benchmarks.suite import LatencyDevice, LatencyTable, Suite
from sparsifier import Calibration, Compensated, Plan, SparsifierError
from sparsifier.sites import ACT

Row = dict[str, Any]


def run(suite: Suite, options: Options, console: Console) -> Path:
    """Time everything that `suite` names, and write its folder.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    SuiteError
        If the suite times nothing on the device.
    """
    assert suite.latency is not None
    table = suite.latency.cpu
    if table is None or options.device != "cpu":
        raise SuiteError(f"suite {suite.name} times nothing on {options.device}; allowed: --device cpu")
    texts.provide(options.texts)
    before = torch.get_num_threads()
    kernels: list[Row] = []
    decoded: list[Row] = []
    paths: dict[str, Any] = {}
    folder = options.output / suite.name

    def write() -> None:  # after every part: what is measured is not lost when a later one is stopped
        facts = {"suite": suite.model_dump(), "dense_paths": paths, "measured_on": provenance.collect(options.device)}
        _write(folder, kernels, decoded, facts)

    try:
        for threads in table.threads:
            torch.set_num_threads(threads)
            kernels += _matrices(table, threads, console)
            for name in table.models:
                for dtype in table.dtypes:
                    found, tried = _model(suite, options, name, dtype, threads, console)
                    decoded += found
                    paths[f"{name}, {dtype}, {threads} threads"] = tried
                    write()
    finally:
        torch.set_num_threads(before)
    console.end()
    write()
    return folder


def _matrices(table: LatencyDevice, threads: int, console: Console) -> list[Row]:
    rows = []
    for i, text in enumerate(table.matrices):
        for dtype in table.dtypes:
            console.begin(i, len(table.matrices), f"{text}, {dtype}")
            found, raw = matrices.measure(matrices.Matrix.parse(text), getattr(torch, dtype), table.sparsities, threads)
            for row, seconds in zip(found, raw.values()):
                rows.append(row | {"threads": threads, "raw": [round(s, 8) for s in seconds]})
    return rows


@dataclass
class Subject:
    """Two copies of one model, the second to be made sparse, and where its plans come from."""

    name: str
    dense: Any
    sparse: Any
    vocabulary: int
    bench: Bench | None
    ids: Tensor

    @classmethod
    def load(
        cls, suite: Suite, table: LatencyTable, options: Options, spec: str, dtype: str, console: Console
    ) -> Subject:
        length, kind = table.prompt + table.tokens + 1, getattr(torch, dtype)
        if spec in shapes.SHAPES:
            dense, sparse = (shapes.random_model(spec, kind) for _ in range(2))
            size = dense.config.vocab_size
            ids = torch.randint(3, size, (1, length), generator=torch.Generator().manual_seed(1))
            return cls(shapes.name_of(spec), dense, sparse, size, None, ids)
        source = models.resolve(spec, console.say, console.bytes)
        needs = frozenset().union(*(cell.sparsifier.needs for cell in cells_of(suite)))
        bench = Bench(suite, source, "cpu", console.stage, needs, fit_setting(suite, source, "cpu"))
        ids = texts.windows("papers", "evaluation", bench.tokenizer, length, 1).ids
        dense, sparse = (source.load(kind) for _ in range(2))
        return cls(source.name, dense, sparse, dense.config.vocab_size, bench, ids)

    def plan(self, cell: Cell) -> Plan:
        """The fitted plan; on random weights thresholds are fitted to the activations, and biases are random."""
        if self.bench is not None:
            return measure.fitted(self.bench, cell)
        method, inner = cell.sparsifier, cell.sparsifier
        while isinstance(inner, Compensated):
            inner = inner.inner
        if "svd" in vars(inner):
            inner = replace(inner, svd="randomised")  # type: ignore[call-arg]
        windows = torch.randint(3, self.vocabulary, (3, 48), generator=torch.Generator().manual_seed(2))
        plan = inner.fit(self.sparse, Calibration(windows, batch_size=4))
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


def _model(
    suite: Suite, options: Options, spec: str, dtype: str, threads: int, console: Console
) -> tuple[list[Row], dict[str, Any]]:
    """A row a cell, and the seconds a token of the dense paths that were tried."""
    table = suite.latency
    assert table is not None
    subject = Subject.load(suite, table, options, spec, dtype, console)
    console.begin(0, 1, f"{subject.name}, {dtype}: dense paths")
    path, tried = decode.fastest_dense(subject.dense, subject.ids, table.prompt, threads)
    rows = []
    cells = [c for c in cells_of(suite, options.methods) if c.table.name != "dense"]
    for i, cell in enumerate(cells):
        console.begin(i, len(cells), f"{subject.name}, {dtype}: {cell.label} at {cell.target:g}")
        about = {
            "model": subject.name,
            "dtype": dtype,
            "threads": threads,
            "method": cell.label,
            "target": cell.target,
            "dense_path": path,
        }
        rows.append(about | dict(_cell(subject, cell, table, path, threads)))
        console.say(_shown(rows[-1]))
    return rows, {"fastest": path, "seconds": tried}


def _cell(subject: Subject, cell: Cell, table: LatencyTable, path: str, threads: int) -> Iterator[tuple[str, Any]]:
    try:
        plan = subject.plan(cell)
        times = decode.compare(
            subject.dense, subject.sparse, plan, subject.ids, table.prompt, cell.tokens, path, threads
        )
    except SparsifierError as error:
        yield "reason", str(error)
        return
    linears, rest = decode.weight_bytes(subject.dense)
    read = linears * (1.0 - times["sparsity"]) + rest
    speedup = timing.fast(times["dense"]) / timing.fast(times["sparse"])
    limit = (linears + rest) / read
    yield "byte_sparsity", times["sparsity"]
    for name in ("dense", "sparse"):
        for label, q in (("p20", timing.FAST), ("p50", 0.5), ("p99", 0.99)):
            yield f"{name}_{label}", timing.quantile(times[name], q)
    yield "tokens_per_second", 1.0 / timing.quantile(times["sparse"], 0.5)
    yield "bytes_per_token", read
    yield "bandwidth", read / timing.fast(times["sparse"])
    yield "speedup", speedup
    yield "limit", limit
    yield "share", speedup / limit
    yield "prefill_dense", min(times["prefill_dense"])
    yield "prefill_sparse", min(times["prefill_sparse"])
    yield "raw_dense", [round(s, 7) for s in times["dense"]]
    yield "raw_sparse", [round(s, 7) for s in times["sparse"]]


def _shown(row: Row) -> str:
    name = f"{row['method']:<22} {row['target']:<5.4g}"
    if "reason" in row:
        return f"{name} {row['reason']}"
    times = f"{1e3 * row['sparse_p20']:6.1f} ms a token, dense {1e3 * row['dense_p20']:6.1f}"
    return f"{name} {times}: {row['speedup']:.2f} times, of at most {row['limit']:.2f}"


def _write(folder: Path, kernels: list[Row], decoded: list[Row], facts: dict[str, Any]) -> None:
    """Tables as CSV, raw values as Parquet, provenance as JSON, and the report."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("matrices", kernels), ("decode", decoded)):
        frame = pd.DataFrame(rows)
        raw = [c for c in frame.columns if c.startswith("raw")]
        frame.drop(columns=raw).to_csv(folder / f"{name}.csv", index=False, float_format="%.6g")
        if rows:
            frame.to_parquet(folder / f"{name}-raw.parquet", index=False, compression="zstd")
    cache.write_whole(folder / "provenance.json", json.dumps(facts, indent=1, default=str) + "\n")
    report.write(folder)
