"""Jobs in processes of this machine: what dies is run again once, GPUs are dealt out in turn, and none is left over."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from families import build
from two_models import saved

from resting.benchmarks.assets import models
from resting.benchmarks.cells import expand, suite_file
from resting.benchmarks.cells.options import Options
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.progress import Console
from resting.benchmarks.sweep import execution, executors, jobs, processes
from resting.benchmarks.sweep.execution import Execution
from resting.benchmarks.sweep.mode import ExecutorName, Mode


@pytest.fixture
def two():
    runs = processes.Processes(2, "cpu")
    yield runs
    runs.close()


def test_they_run_raise_and_stay(two):
    assert two.submit(divmod, 7, 2).result() == (3, 1)
    pids = {two.submit(os.getpid).result() for _ in range(6)}
    assert len(pids) == 2
    assert os.getpid() not in pids
    with pytest.raises(BenchmarkError, match="ZeroDivisionError: "):
        two.submit(divmod, 1, 0).result()
    assert {two.submit(os.getpid).result() for _ in range(4)} == pids  # an error ends no process


def test_a_job_whose_process_died_is_run_once_more(two, tmp_path):
    marker = tmp_path / "marker"
    code = f"import os, signal, pathlib; p = pathlib.Path({str(marker)!r}); first = not p.exists(); p.touch(); "
    assert two.submit(exec, code + "first and os.kill(os.getpid(), signal.SIGKILL)").result() is None
    assert marker.exists()
    with pytest.raises(BenchmarkError, match="ended with exit code -9"):
        two.submit(exec, "import os, signal; os.kill(os.getpid(), signal.SIGKILL)").result()
    assert two.submit(divmod, 7, 2).result() == (3, 1)  # others take the places of the dead


def test_what_is_cancelled_ends_at_once(two):
    running = two.submit(time.sleep, 600)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.result)
        while running._worker is None:
            time.sleep(0.01)
        running.cancel()
        with pytest.raises(BenchmarkError, match="ended with exit code"):
            waiting.result(60)


def test_gpus_are_dealt_out_in_turn_and_shared_where_there_are_fewer(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    runs = processes.Processes(3, "cuda")
    try:
        workers = [runs.take() for _ in range(3)]
        for worker in workers:
            worker.connection.send((os.getenv, (processes.VISIBLE,)))
        assert [worker.connection.recv() for worker in workers] == [(True, "4"), (True, "7"), (True, "4")]
    finally:
        runs.close()


@pytest.mark.parametrize(
    ("workers", "gpus", "said"),
    [
        (2, 2, None),
        (3, 0, None),
        (6, 2, "6 workers on 2 GPUs: up to 3 share one"),
        (2, 1, "2 workers on 1 GPU: up to 2"),
    ],
)
def test_sharing_is_said(workers, gpus, said):
    found = processes.shared(workers, gpus)
    assert found is None if said is None else found.startswith(said)


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
    code = (
        "import os, time\nfrom resting.benchmarks.sweep.processes import Processes\n"
        "if __name__ == '__main__':\n    runs = Processes(1, 'cpu')\n"
        "    print(runs.submit(os.getpid).result(), flush=True)\n    runs.submit(time.sleep, 600).result()\n"
    )
    script = tmp_path / "parent.py"
    script.write_text(code)
    parent = subprocess.Popen([sys.executable, "-P", script], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_would_be_ignored_is_refused():
    with pytest.raises(
        BenchmarkError, match="--workers 2: one process runs one job at once; allowed: 1, or --executor p"
    ):
        Execution(workers=2)
    for who in (ExecutorName.SERIAL, ExecutorName.PROCESSES):
        with pytest.raises(BenchmarkError, match="--executor-parameter num_gpus: processes of this machine take none"):
            Execution(executor=who, parameters={"num_gpus": "1"})
    for how in ({"shard": (1, 2)}, {"executor": ExecutorName.PROCESSES}):
        with pytest.raises(BenchmarkError, match=f"--{next(iter(how))}.*: --mode only-cache runs nothing"):
            Execution(Mode.ONLY_CACHE, **how)


def test_local_jobs_of_submitit_see_all_gpus(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with executors.executor(ExecutorName.SUBMITIT, 2, tmp_path, "cuda", {}) as runs:
        assert runs.submit(os.getenv, "CUDA_VISIBLE_DEVICES").result() == "4,7"


def test_long_jobs_come_first_model_by_model(tmp_path, monkeypatch):
    """So that processes end together, and load each model once."""
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    tiny.provide_texts(monkeypatch)
    text = tiny.SUITE.replace("[0.5]", "[0.4, 0.5]") + '[[methods]]\nname = "spon(teal)"\n'
    (tmp_path / "mine.toml").write_text(text)
    suite = suite_file.load(str(tmp_path / "mine.toml"))
    sources = [models.resolve(str(saved(build("llama", seed=n), tmp_path / str(n) / "model"))) for n in range(2)]
    made = jobs.jobs_of(suite, expand.cells_of(suite), Options(tmp_path), sources, {}, Mode.ONLY_MISSING)
    taken = []

    class Runs:
        def submit(self, function, job):
            taken.append((sources.index(job.source), job.label, len(job.cells)))
            return SimpleNamespace(result=lambda: [key for key, _ in job.cells])

    monkeypatch.setattr(execution, "executor", lambda *_: nullcontext(Runs()))
    Execution(executor=ExecutorName.PROCESSES, workers=1).distribute(made, Console(quiet=True))
    order = [("spon(teal)", 1), ("spon(teal)", 1), ("teal", 2), ("dense", 1)]
    assert taken == [(source, *of) for source in range(2) for of in order]
