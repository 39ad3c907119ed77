"""Names the choices of a run that the command line offers: what is run again, and who runs it."""

from __future__ import annotations

from enum import StrEnum


class Mode(StrEnum):
    """Says what a run does about the store of finished cells."""

    ONLY_MISSING = "only-missing"
    ONLY_CACHE = "only-cache"
    FORCE = "force"


class ExecutorName(StrEnum):
    """Says who runs the jobs: this process, others of this machine, Slurm (or processes here) by submitit, or Ray."""

    SERIAL = "serial"
    PROCESSES = "processes"
    SUBMITIT = "submitit"
    RAY = "ray"
