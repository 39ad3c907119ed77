"""The store, the sweep over it, merging, and who runs groups."""

from __future__ import annotations

import gc
import json
import operator
import time
import weakref

import pytest
import torch

from resting.benchmarks.cells.cell import Result
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.sweep import executors
from resting.benchmarks.sweep.execution import Execution
from resting.benchmarks.sweep.merge import merge
from resting.benchmarks.sweep.mode import ExecutorName, Mode
from resting.benchmarks.sweep.run_cells import attempt, failures, run_cells
from resting.benchmarks.sweep.store import Store, StoreError


def result(value: float, status: str = "done") -> Result:
    row = {"model": "m", "method": "teal", "target": 0.5, "metric": "x", "value": value, "reason": None}
    return Result(status, rows=[row])


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "cells")


def run(store, measure, keys="abc", mode=Mode.ONLY_MISSING):
    return [(key, found) for key, _, found, _ in run_cells([(k, k) for k in keys], store, measure, mode)]


def test_what_is_finished_is_not_run_again(store):
    calls: list[str] = []

    def measure(item):
        calls.append(item)
        return result(1.0)

    run(store, measure)
    run(store, measure, "abcd")
    assert calls == ["a", "b", "c", "d"]
    run(store, measure, "a", Mode.FORCE)
    assert calls[-2:] == ["d", "a"]
    assert run(store, measure, "ae", Mode.ONLY_CACHE)[1] == ("e", None)
    assert len(calls) == 5


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("a shape"), "failed"),
        (FileNotFoundError(2, "gone"), "failed"),
        (torch.OutOfMemoryError("40 GiB"), "out-of-memory"),
        (MemoryError(), "out-of-memory"),
    ],
)
def test_a_failure_stops_nothing_is_kept_and_is_tried_again(store, error, status):
    broken = True

    def measure(item):
        if broken and item == "b":
            raise error
        return result(2.0)

    found = dict(run(store, measure))
    assert [r.status for r in found.values()] == ["done", status, "done"]
    assert "Traceback" in found["b"].info["traceback"]
    kept = store.load("b")
    assert kept is not None
    assert kept.status == status
    assert failures(found.items()) == [f"b: {status}, {kept.info['reason']}"]
    broken = False
    assert dict(run(store, measure))["b"].status == "done"


def test_a_number_that_is_not_finite_is_divergence(store):
    found = run(store, lambda _: result(float("inf")), "a")[0][1]
    assert found.status == "diverged"
    assert found.rows[0]["value"] is None
    assert found.rows[0]["reason"] == "diverged: the value is inf"
    assert run(store, lambda _: 1 / 0, "a")[0][1].status == "diverged"  # finished: not run again


def test_what_a_user_did_wrong_is_no_failed_cell():
    def measure(_):
        raise BenchmarkError("the text cannot be had")

    with pytest.raises(BenchmarkError, match="cannot be had"):
        attempt(measure, None)


def test_what_a_failed_cell_held_is_given_back():
    class Held:
        def __init__(self):
            self.itself = self  # as a model whose layers are hooked

    known = []

    def measure(_):
        held = Held()
        known.append(weakref.ref(held))
        raise RuntimeError("after it was loaded")

    gc.disable()
    try:
        assert attempt(measure, None).status == "failed"
        assert known[0]() is None
    finally:
        gc.enable()


def test_a_gpu_that_is_lost_fails_its_cells_and_no_more(monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lost)
    assert attempt(lost, None).info["reason"].startswith("RuntimeError: CUDA error")


def test_an_interruption_is_no_failed_cell(store):
    def measure(_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(store, measure)
    assert not list(store.keys())


def test_a_damaged_file_is_run_again_and_a_newer_one_refused(store):
    run(store, lambda _: result(1.0), "a")
    whole = store.path("a").read_text()
    for damage in (whole[:40], "", "[]", '{"status": "done", "strange": 1}'):
        store.path("a").write_text(damage)
        assert store.load("a") is None
    store.path("a").write_text(json.dumps(json.loads(whole) | {"schema": 2}))
    with pytest.raises(StoreError, match="schema 2; this version reads up to 1"):
        store.load("a")
    store.path("a").write_text(json.dumps({k: v for k, v in json.loads(whole).items() if k != "schema"}))
    assert store.finished("a") is not None  # written before there was a schema


def test_a_cell_that_another_process_runs_comes_last(store):
    seen = []
    with store.claimed("a") as mine:
        assert mine
        started = run_cells([(k, k) for k in "abc"], store, lambda item: seen.append(item) or result(1.0))
        assert [next(started)[0] for _ in range(2)] == ["b", "c"]
        store.save("a", result(5.0))
    key, _, found, was_finished = next(started)
    assert (key, found.rows[0]["value"], was_finished) == ("a", 5.0, True)
    assert seen == ["b", "c"]


def test_merging_adds_and_names_contradictions(tmp_path, store):
    a, b = Store(tmp_path / "a" / "cells"), Store(tmp_path / "b")
    for where, key, value in ((store, "x", 1.0), (a, "x", 1.0), (a, "y", 2.0), (b, "x", 1.5), (b, "z", 3.0)):
        where.save(key, result(value))
    a.save("w", result(0.0, "failed"))
    found = merge(store, [tmp_path / "a", tmp_path / "b"])
    assert (found.added, found.same) == (2, 1)
    assert found.conflicts == [f"m, teal at 0.5: x is 1.0 here and 1.5 in {tmp_path / 'b'}"]
    assert store.finished("x").rows[0]["value"] == 1.0
    assert store.load("w") is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(BenchmarkError, match="holds no store"):
        merge(store, [tmp_path / "empty"])


@pytest.mark.alone
def test_a_thousand_cells_cost_little_more_than_their_files(store, tmp_path):
    def seconds(call):
        began = time.perf_counter()
        call()
        return time.perf_counter() - began

    cells = [(f"{i:04}", i) for i in range(1000)]
    text = json.dumps(vars(result(1.0)))
    files = seconds(lambda: [(tmp_path / key).write_text(text) for key, _ in cells])
    first = seconds(lambda: list(run_cells(cells, store, lambda i: result(float(i)))))
    again = seconds(lambda: list(run_cells(cells, store, lambda i: 1 / 0)))
    assert first < 100 * files  # about 10 where it was measured: 0.3 ms a cell
    assert again < 20 * files


@pytest.mark.parametrize(
    ("text", "message"),
    [("2", "must be PART/PARTS"), ("a/b", "must be PART/PARTS"), ("0/3", "in 1 to 3"), ("4/3", "in 1 to 3")],
)
def test_bad_shards_are_refused(text, message):
    with pytest.raises(BenchmarkError, match=message):
        Execution.parse_shard(text)


def test_an_execution_takes_names_and_refuses_others():
    named = Execution(executor="submitit", mode="force")
    assert (named.executor, named.mode) == (ExecutorName.SUBMITIT, Mode.FORCE)
    assert named.executor is ExecutorName.SUBMITIT
    with pytest.raises(BenchmarkError, match="executor 'dask'; allowed: serial, processes, submitit, ray"):
        Execution(executor="dask")


def test_shards_are_all_groups_once():
    parts = [Execution(shard=Execution.parse_shard(f"{i}/3")) for i in (1, 2, 3)]
    assert all(sum(part.takes(number) for part in parts) == 1 for number in range(10))


@pytest.mark.parametrize("name", [ExecutorName.PROCESSES, ExecutorName.SUBMITIT, ExecutorName.RAY])
def test_executors_run_and_raise(name, tmp_path):
    with executors.executor(name, 2, tmp_path, "cpu", {}) as runs:
        futures = [runs.submit(operator.truediv, 4, x) for x in (2, 0)]
        assert futures[0].result() == 2
        with pytest.raises(Exception, match="division by zero"):
            futures[1].result()


def test_an_executor_that_is_not_installed_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "submitit", None)
    with (
        pytest.raises(BenchmarkError, match="pip install submitit"),
        executors.executor(ExecutorName.SUBMITIT, 1, tmp_path, "cpu", {}),
    ):
        pass
