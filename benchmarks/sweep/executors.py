"""Runs jobs elsewhere: in a cluster's queue, or by Ray. One seam, ``submit(function, job) -> Future``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.sweep.mode import ExecutorName

PASSED = ("RESTING_CACHE", "HF_HUB_OFFLINE", "HF_HOME", "OMP_WAIT_POLICY")
"""Variables that workers of a cluster must see as this process does."""


class Executor(Protocol):
    """Runs functions somewhere."""

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Start ``function(*arguments)``; the result has ``cancel()``, and ``result()``, which waits and raises."""
        ...


class Ray:
    """Runs functions on a Ray cluster, or on this machine's cores where there is none."""

    def __init__(self, workers: int, device: str, parameters: dict[str, Any]) -> None:
        import ray

        self._ray = ray
        if not ray.is_initialized():
            passed = {name: os.environ[name] for name in PASSED if name in os.environ}
            ray.init(
                num_cpus=workers,
                include_dashboard=False,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": passed},
            )
        default = {"num_cpus": 1} if device == "cpu" else {"num_gpus": 1}
        self._resources = default | {name: float(value) for name, value in parameters.items()}

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        ray, reference = self._ray, self._ray.remote(**self._resources)(_call).remote(function, *arguments)

        class Waiting:
            def result(self) -> Any:
                return ray.get(reference)

            def cancel(self) -> None:
                ray.cancel(reference, force=True)

        return Waiting()


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@contextmanager
def executor(
    name: ExecutorName, workers: int, folder: Path, device: str, parameters: dict[str, Any]
) -> Iterator[Executor]:
    """Make an executor by its name.

    Parameters
    ----------
    name : ExecutorName
        ``submitit`` submits to Slurm where there is one, else to processes of this machine.
    workers : int
        Number of jobs that run at once, at most.
    folder : Path
        Where submitit keeps its logs, under ``jobs``: one that all machines see.
    device : str
        A job takes one GPU of an executor where it is ``cuda``.
    parameters : dict
        For submitit, such as ``slurm_partition`` or ``timeout_min``; for Ray, ``num_gpus`` and ``num_cpus`` of a job.

    Raises
    ------
    BenchmarkError
        If its package is not installed.
    """
    try:
        built: Any = (
            _submitit(workers, folder, device, parameters)
            if name is ExecutorName.SUBMITIT
            else Ray(workers, device, parameters)
        )
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"--executor {name} needs the package {error.name}: pip install {error.name}") from None
    try:
        yield built
    finally:
        if name is ExecutorName.RAY:
            built._ray.shutdown()


def _submitit(workers: int, folder: Path, device: str, parameters: dict[str, Any]) -> Any:
    import submitit

    built = submitit.AutoExecutor(folder=folder / "jobs")
    settings: dict[str, Any] = {"timeout_min": 24 * 60, "slurm_array_parallelism": workers} | parameters
    if device.startswith("cuda"):
        settings.setdefault("gpus_per_node", 1)
    try:
        built.update_parameters(**settings)
    except (NameError, TypeError) as error:
        raise BenchmarkError(f"--executor-parameter: {error}") from None
    return built
