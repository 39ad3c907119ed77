"""Says how a run is executed: what is run again, where, and which part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from resting.benchmarks import cache
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells.cell import Result
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import BenchmarkError, SuiteError
from resting.benchmarks.progress import Console
from resting.benchmarks.sweep.executors import Executor, executor
from resting.benchmarks.sweep.jobs import Job, run_job, run_job_and_keep
from resting.benchmarks.sweep.mode import ExecutorName, Mode
from resting.benchmarks.sweep.processes import Processes, shared, visible_gpus
from resting.benchmarks.sweep.store import Store


@dataclass(frozen=True)
class Execution:
    """Holds what the command line says about the running of jobs.

    Attributes
    ----------
    mode : Mode
    executor : ExecutorName
    workers : int
        Jobs at once.
    shard : (int, int), optional
        Part i of n, from 1: every n-th job. The others are taken from the store, where they are there.
    parameters : dict
        Of submitit or Ray.
    """

    mode: Mode = Mode.ONLY_MISSING
    executor: ExecutorName = ExecutorName.SERIAL
    workers: int = 1
    shard: tuple[int, int] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, choices in (("mode", Mode), ("executor", ExecutorName)):
            given = getattr(self, name)
            if given not in list(choices):
                raise BenchmarkError(f"{name} {given!r}; allowed: {', '.join(choices)}")
            object.__setattr__(self, name, choices(given))  # a plain string is one as well
        others = ", ".join(name for name in ExecutorName if name is not ExecutorName.SERIAL)
        if self.executor in (ExecutorName.SERIAL, ExecutorName.PROCESSES) and self.parameters:
            raise BenchmarkError(
                f"--executor-parameter {next(iter(self.parameters))}: processes of this machine take none; "
                "allowed: with --executor submitit or ray"
            )
        if self.mode is Mode.ONLY_CACHE and (self.shard or self.executor is not ExecutorName.SERIAL):
            option = "--shard" if self.shard else f"--executor {self.executor}"
            raise BenchmarkError(f"{option}: --mode only-cache runs nothing; allowed: one of the two")
        if self.executor is ExecutorName.SERIAL and self.workers > 1:
            raise BenchmarkError(
                f"--workers {self.workers}: one process runs one job at once; allowed: 1, or --executor {others}"
            )

    @staticmethod
    def parse_shard(text: str | None) -> tuple[int, int] | None:
        """Read ``"2/8"``.

        Raises
        ------
        BenchmarkError
        """
        if text is None:
            return None
        try:
            part, parts = (int(value) for value in text.split("/"))
        except ValueError:
            raise BenchmarkError(f"--shard {text!r}; must be PART/PARTS, such as 2/8") from None
        if not 1 <= part <= parts:
            raise BenchmarkError(f"--shard {text!r}; the part must be in 1 to {parts}")
        return part, parts

    def check(self, suite: Suite) -> None:
        """Refuse, for a suite of times, what is said of cells: times are taken in one process, and anew in every run.

        Raises
        ------
        SuiteError
        """
        if suite.latency is None:
            return
        asked = {
            f"--mode {self.mode}": self.mode is Mode.ONLY_CACHE,
            f"--executor {self.executor}": self.executor is not ExecutorName.SERIAL,
            "--shard": self.shard is not None,
        }
        if option := next((name for name, is_asked in asked.items() if is_asked), None):
            raise SuiteError(
                f"{option}: suite {suite.name} measures time, in one process and anew in every run; allowed: the suite "
                "without it"
            )

    def takes(self, number: int) -> bool:
        """Whether job `number` is of this part."""
        return self.shard is None or number % self.shard[1] == self.shard[0] - 1

    def distribute(
        self, jobs: list[Job], console: Console, on_job: Callable[[Job, int, int], Any] = lambda job, done, total: None
    ) -> dict[ModelSource, str]:
        """Have the jobs of this part that are not finished run by the executor; results are then in the store.

        Parameters
        ----------
        jobs : list of Job
        console : Console
        on_job : callable
            Is told every job that ended, how many have, and how many there are.

        Returns
        -------
        dict of ModelSource to str
            Models that are refused, with the reason.
        """
        refused: dict[ModelSource, str] = {}
        under_way: list[Any] = []
        store = Store.default()
        mine = [job for number, job in enumerate(jobs) if self.takes(number) and self.needs(job, store)]
        if self.executor is ExecutorName.PROCESSES:  # which keep the model: small jobs cost nothing
            parts = [part for job in mine for part in job.parts() if self.needs(part, store)]
            models = list(dict.fromkeys(part.source for part in parts))
            # Model by model, since each is loaded anew; of one the longest first, so that all end together.
            mine = sorted(parts, key=lambda part: (models.index(part.source), -part.forwards()))
        before = {
            key: store.load(key)
            for job in mine
            for key, _ in job.cells
            if self.mode is Mode.FORCE or store.finished(key) is None
        }
        total = len(mine)
        device = mine[0].options.device if mine else "cpu"
        gpus = len(visible_gpus()) if self.executor is ExecutorName.PROCESSES and device == "cuda" else 0
        if note := shared(min(self.workers, total), gpus):
            console.say(note)
        started = executor(self.executor, self.workers, cache.root(), device, dict(self.parameters))
        # So many threads wait as jobs may be under way.
        with started as runs, ThreadPoolExecutor(self.workers) as pool:
            waiting = [(job, pool.submit(_wait, runs, job, under_way)) for job in mine]
            try:
                for number, (job, future) in enumerate(waiting):
                    console.begin(number, total, f"{job.label} on {self.executor}")
                    try:
                        found = future.result()
                    except Exception as error:  # a worker that died: its cells say so, and the others go on
                        _lost(job, store, error, before)
                    else:
                        refused |= {job.source: found} if isinstance(found, str) else {}
                    on_job(job, number + 1, total)
            except BaseException:  # who stops a run does not wait for what is under way
                pool.shutdown(wait=False, cancel_futures=True)
                for one in under_way:
                    one.cancel()
                raise
        console.end()
        return refused

    def needs(self, job: Job, store: Store) -> bool:
        """Whether anything of a job is to be run."""
        if self.mode is Mode.ONLY_CACHE:
            return False
        return self.mode is Mode.FORCE or any(store.finished(key) is None for key, _ in job.cells)


SERIAL = Execution()
"""In this process, what is missing, all of it."""


def _wait(runs: Executor, job: Job, under_way: list[Any]) -> list[str] | str:
    submitted = runs.submit(run_job_and_keep if isinstance(runs, Processes) else run_job, job)
    under_way.append(submitted)
    found: list[str] | str = submitted.result()
    return found


def _lost(job: Job, store: Store, error: Exception, before: Mapping[str, Result | None]) -> None:
    """Note why cells have no result: those that were to be run, and of which the store holds what it held before."""
    lines = str(error).strip().splitlines() or ["no message"]
    reason = f"its worker ended: {type(error).__name__}: {lines[-1][:300]}"
    for key, _ in job.cells:
        if key in before and store.load(key) == before[key]:
            store.save(key, Result("failed", info={"reason": reason, "traceback": str(error)}))
