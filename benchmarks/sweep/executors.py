"""Runs jobs elsewhere: in other processes, a cluster's queue, or Ray. One seam, ``submit(function, job) -> Future``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.sweep.mode import ExecutorName
from resting.benchmarks.sweep.processes import Processes, visible_gpus

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
        default = {"num_cpus": 1.0} if device == "cpu" else {"num_gpus": 1.0}
        if device == "cuda" and (gpus := int(ray.cluster_resources().get("GPU", 0))) and workers > gpus:
            default = {"num_gpus": 1.0 / -(-workers // gpus)}  # so many share one
        self._resources = default | {name: float(value) for name, value in parameters.items()}

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Any:
        ray, reference = self._ray, self._ray.remote(**self._resources)(_call).remote(function, *arguments)

        class Waiting:
            def result(self) -> Any:
                return ray.get(reference)

            def cancel(self) -> None:
                ray.cancel(reference, force=True)

        return Waiting()

    def close(self) -> None:
        """Leave the cluster, or end the one that was started here."""
        self._ray.shutdown()


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
        ``processes`` needs no package; ``submitit`` submits to Slurm where there is one, else to processes of this
        machine.
    workers : int
        Number of jobs that run at once, at most.
    folder : Path
        Where submitit keeps its logs, under ``jobs``: one that all machines see.
    device : str
        A job takes one GPU of an executor where it is ``cuda``; of processes and Ray, jobs share GPUs where there are
        more workers than these.
    parameters : dict
        For submitit, such as ``slurm_partition`` or ``timeout_min``; for Ray, ``num_gpus`` and ``num_cpus`` of a job.

    Raises
    ------
    BenchmarkError
        If its package is not installed, or it takes no parameters and gets some.
    """
    built: Any
    try:
        if name is ExecutorName.PROCESSES:
            built = Processes(workers, device)
        elif name is ExecutorName.SUBMITIT:
            built = _submitit(workers, folder, device, parameters)
        else:
            built = Ray(workers, device, parameters)
    except ModuleNotFoundError as error:
        raise BenchmarkError(f"--executor {name} needs the package {error.name}: pip install {error.name}") from None
    try:
        yield built
    finally:
        if name is not ExecutorName.SUBMITIT:
            built.close()


def _submitit(workers: int, folder: Path, device: str, parameters: dict[str, Any]) -> Any:
    import submitit

    built = submitit.AutoExecutor(folder=folder / "jobs")
    settings: dict[str, Any] = {"timeout_min": 24 * 60, "slurm_array_parallelism": workers} | parameters
    if device.startswith("cuda") and built.cluster == "slurm":
        settings.setdefault("gpus_per_node", 1)
    try:
        built.update_parameters(**settings)
        if device.startswith("cuda") and built.cluster == "local" and "gpus_per_node" not in parameters:
            # One GPU a job would be the first one for all of them: they see all, and lease one each (`gpus`).
            seen = [int(name) if name.isdigit() else place for place, name in enumerate(visible_gpus())]
            built._executor.update_parameters(gpus_per_node=len(seen), visible_gpus=seen)
    except (NameError, TypeError) as error:
        raise BenchmarkError(f"--executor-parameter: {error}") from None
    return built
