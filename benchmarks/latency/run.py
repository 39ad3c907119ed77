"""`resting run` of a suite that measures time: matrices, then models, on this machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from resting.benchmarks import names, provenance
from resting.benchmarks.assets import texts
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.expand import cells_of
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cells.suite import LatencyConfig, LatencyDeviceConfig, Suite
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency import decode, matrices, timing
from resting.benchmarks.latency.record import Record, Row
from resting.benchmarks.latency.timed_model import Subject
from resting.benchmarks.progress import Console
from resting.sparsifier import Plan, SparsifierError, TokenPolicy

if TYPE_CHECKING:
    from resting.benchmarks.latency.gpu.model import GpuModel
    from resting.sparsifier.decoding.cuda_layouts import Shape

HALF = 0.5
"""Target that layouts are chosen at, or near."""
Timed = Callable[[Plan, Plan | None, TokenPolicy], dict[str, Any]]
"""Times of the dense and the sparse model, and of what the plan adds to, in turn (`decode.compare`)."""


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
    kind = options.device.split(":")[0]
    table: LatencyDeviceConfig | None = getattr(suite.latency, kind, None)
    if table is None:
        allowed = " or ".join(f"--device {d}" for d in ("cpu", "cuda") if getattr(suite.latency, d) is not None)
        raise SuiteError(f"suite {suite.name} times nothing on {options.device}; allowed: {allowed or 'nothing'}")
    if (index := torch.device(options.device).index) is not None and kind == "cuda":
        torch.cuda.set_device(index)  # `cuda` alone is the current one
    texts.provide(options.texts)
    before = torch.get_num_threads()
    record = _begin(suite, options)
    try:
        for threads in table.threads:
            torch.set_num_threads(threads)
            for rows in _matrices(table, threads, options.device, console):
                record.matrices += rows
                record.save()
            _layouts(record, "matrices")
            for name in table.models:
                for dtype in table.dtypes:
                    for row in _model(suite, options, name, dtype, threads, console, record.facts["dense_paths"]):
                        record.decode.append(row)
                        record.save()
                    _layouts(record, f"{name}, {dtype}")
                    gc.collect()  # graphs of a GPU hold memory, and are held in circles
    finally:
        torch.set_num_threads(before)
        console.end()
        if record.matrices or record.decode:
            record.finish()
    return record.folder


def _begin(suite: Suite, options: Options) -> Record:
    facts: Row = {"suite": suite.model_dump(), "dense_paths": {}, "measured_on": provenance.collect(options.device)}
    if options.device == "cpu":
        return Record(options.output / suite.name, facts)
    from resting.benchmarks.latency.gpu.model import copy_bandwidth

    facts["copy_bandwidth"] = copy_bandwidth(options.device)
    facts["launches"] = {}
    return Record(options.output / f"{suite.name}-{names.of_device(torch.cuda.get_device_name(options.device))}", facts)


def _layouts(record: Record, part: str) -> None:
    """Write down which layouts a part of the run was timed with; the next part chooses its own."""
    if "launches" in record.facts:
        from resting.sparsifier.decoding import cuda_layouts

        record.facts["launches"][part] = dict(cuda_layouts.CHOSEN)
        cuda_layouts.CHOSEN.clear()


def _matrices(table: LatencyDeviceConfig, threads: int, device: str, console: Console) -> Iterator[list[Row]]:
    for i, text in enumerate(table.matrices):
        for dtype in table.dtypes:
            console.begin(i, len(table.matrices), f"{text}, {dtype}")
            shape, kind = matrices.Matrix.parse(text), getattr(torch, dtype)
            found, raw = matrices.measure(shape, kind, table.sparsities, threads, device)
            more = [{"threads": threads, "raw": [round(s, 9) for s in seconds]} for seconds in raw.values()]
            yield [row | of for row, of in zip(found, more)]


def _model(
    suite: Suite, options: Options, spec: str, dtype: str, threads: int, console: Console, paths: Row
) -> Iterator[Row]:
    """A row a cell; into `paths` go the seconds a token of the dense ways that were tried."""
    table = suite.latency
    assert table is not None
    subject = Subject.load(suite, table, options, spec, dtype, console)
    console.begin(0, 1, f"{subject.name}, {dtype}: dense paths")
    cells = [c for c in cells_of(suite, options.methods) if c.config.name != "dense"]
    path, tried, timed = _prepared(subject, table, cells, threads)
    paths[f"{spec}, {dtype}, {threads} threads"] = {"fastest": path, "seconds": tried}
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
        row = about | dict(_cell(subject, cell, timed))
        console.say(_shown(row))
        yield row


def _prepared(
    subject: Subject, table: LatencyConfig, cells: list[Cell], threads: int
) -> tuple[str, dict[str, float | str], Timed]:
    """The fastest dense path, what was tried, and how plans are timed against it."""
    dense, sparse, ids, prompt = subject.dense, subject.sparse, subject.ids, table.prompt
    if subject.ids.is_cuda:
        from resting.benchmarks.latency.gpu.model import GpuModel

        model = GpuModel(subject, prompt)
        _settle(model, subject, cells)
        path, way, tried = model.fastest_dense()
        return path, tried, lambda plan, bare, tokens: model.compare(way, plan, bare)
    path, tried = decode.fastest_dense(dense, ids, prompt, threads)

    def timed(plan: Plan, bare: Plan | None, tokens: TokenPolicy) -> dict[str, Any]:
        base = None if bare is None else (subject.third, bare)
        subject.declare()
        return decode.compare(dense, sparse, plan, ids, prompt, tokens, path, threads, base)

    return path, tried, timed


def _settle(model: GpuModel, subject: Subject, cells: list[Cell]) -> None:
    """Have layouts chosen under every method, nearest to half, and for the dense way by kernels.

    What two have in common is chosen under the first.
    """
    from resting.benchmarks.latency.gpu import layouts

    settled: set[Shape] = set()
    nearest = sorted(cells, key=lambda cell: -abs(cell.target - HALF))  # the last of a method stays
    chosen = {cell.label: cell for cell in nearest}
    for label in dict.fromkeys(cell.label for cell in cells):
        with suppress(SparsifierError, torch.OutOfMemoryError):  # is told in the cell's row
            layouts.settle(model, subject.plan(chosen[label]), settled)
    with suppress(SparsifierError, torch.OutOfMemoryError):
        layouts.settle(model, decode.neutral(model.model), settled)


def _cell(subject: Subject, cell: Cell, timed: Timed) -> Iterator[tuple[str, Any]]:
    try:
        plan = subject.plan(cell)
        times = timed(plan, subject.bare(cell, plan), cell.policy)
    except (SparsifierError, torch.OutOfMemoryError) as error:
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
    if "base" in times:
        yield "over_base", timing.fast(times["sparse"]) / timing.fast(times["base"])
        yield "raw_base", [round(s, 7) for s in times["base"]]
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
