"""Runs jobs in processes of this machine, with the standard library alone: one GPU a process, or several on each."""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from resting.benchmarks.errors import BenchmarkError

ATTEMPTS = 2
"""A job whose process died is given to another once: what it had finished is in the store."""
PATIENCE = 10.0
"""Seconds that a process has to end by itself."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


class Processes:
    """Runs functions in processes that stay, so that a model is loaded once in each of them.

    With the device ``cuda`` a process sees one GPU, the next one in turn. Where there are more processes than GPUs they
    share them: models too small to fill a GPU run faster so. A process whose parent is gone ends.

    Parameters
    ----------
    workers : int
        Processes at most; each is started when it is needed.
    device : str
    """

    def __init__(self, workers: int, device: str) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._gpus = visible_gpus() if device == "cuda" else []
        self._free: queue.Queue[_Worker | int] = queue.Queue()  # a number stands for one that is not started
        for number in range(workers):
            self._free.put(number)
        self._started: list[_Worker] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> _Running:
        """Make ready to run ``function(*arguments)``: `result` gives it to the next process that is free."""
        return _Running(self, function, arguments)

    def take(self) -> _Worker:
        """Wait for a free process."""
        found = self._free.get()
        if isinstance(found, _Worker):
            return found
        gpu = self._gpus[found % len(self._gpus)] if self._gpus else None
        worker = _Worker(self._context, found, gpu)
        self._started.append(worker)
        return worker

    def give_back(self, worker: _Worker) -> None:
        """Let a process be taken again, or another in the place of one that is dead."""
        self._free.put(worker if worker.process.is_alive() else worker.number)

    def close(self) -> None:
        """End all processes."""
        for worker in self._started:
            worker.connection.close()
        for worker in self._started:
            worker.process.join(PATIENCE)
            if worker.process.is_alive():
                worker.process.kill()


class _Worker:
    """Holds a process, and what is said to it."""

    def __init__(self, context: Any, number: int, gpu: str | None) -> None:
        self.number = number
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, gpu), name=f"resting worker {number}")
        self.process.start()
        theirs.close()


class _Running:
    """Stands for a function that a process runs, or will run."""

    def __init__(self, processes: Processes, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self._processes, self._task = processes, (function, arguments)
        self._worker: _Worker | None = None
        self._is_cancelled = False

    def result(self) -> Any:
        """Wait for the function, and return what it does.

        Raises
        ------
        BenchmarkError
            If it raised (the message is that traceback), or if its process died twice.
        """
        for _ in range(ATTEMPTS):
            self._worker = worker = self._processes.take()
            try:
                worker.connection.send(self._task)
                is_good, answer = worker.connection.recv()
            except (EOFError, OSError):
                worker.process.join(PATIENCE)
                if self._is_cancelled:
                    break
                continue
            finally:
                self._processes.give_back(worker)
            if is_good:
                return answer
            raise BenchmarkError(answer)
        raise BenchmarkError(f"a process that ran it ended with exit code {worker.process.exitcode}")

    def cancel(self) -> None:
        """End the process that runs it."""
        self._is_cancelled = True
        if self._worker is not None:
            self._worker.process.kill()


def visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get(VISIBLE, "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


def shared(workers: int, gpus: int) -> str | None:
    """Say how many workers share a GPU, where some do."""
    if not gpus or workers <= gpus:
        return None
    return f"{workers} workers on {gpus} GPU{'s' * (gpus > 1)}: up to {-(-workers // gpus)} share one"


def work(connection: Connection, gpu: str | None) -> None:
    """Run what comes through `connection` until it is closed: the whole life of a process.

    Parameters
    ----------
    connection : Connection
        Gives functions with their arguments, and takes whether they returned, with the answer or the traceback.
    gpu : str, optional
        The only one that this process sees.
    """
    if gpu is not None:  # before anything asks for a GPU
        os.environ[VISIBLE] = gpu
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who stops the run is the parent
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = True, function(*arguments)
        except BaseException as error:
            lines = "".join(traceback.format_exception(error))
            answer = False, f"{lines}{type(error).__name__}: {error}"
        connection.send(answer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
