"""Gives kernels for a GPU, compiled once and kept on disk; and says why there are none."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from functools import cache

import torch

from resting.sparsifier.decoding import cuda_overlap
from resting.sparsifier.decoding.cuda import driver, nvrtc
from resting.sparsifier.decoding.cuda.variant import Compilable
from resting.sparsifier.decoding.remembered import cache_folder
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.files import replacing

OLDEST = (8, 0)
"""The first compute capability that the kernels take; from 9.0 on launches begin while the one before ends."""
FOLDER = "cubins"
OPTIONS = ["--std=c++17", "--diag-suppress=177"]


@cache
def missing(device: torch.device) -> str | None:
    """Says in one sentence why `device` runs no compiled kernels; None where it does."""
    if device.type != "cuda" or torch.version.hip:
        return "compiled kernels are for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        return (
            f"compiled kernels need compute capability 8.0 or later, and this GPU has {capability[0]}.{capability[1]}"
        )
    if not driver.can_launch():
        return "compiled kernels need a driver that knows cuLaunchKernelEx, as those of CUDA 11.8 and later do"
    if nvrtc.found() is None:
        return "compiled kernels need NVRTC, which was not found beside torch"
    return None


def architecture(device: torch.device) -> str:
    """Names the machine code of a GPU: ``sm_90``."""
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def cubin(variant: Compilable, arch: str) -> bytes:
    """Compiles a kernel, or reads what was compiled earlier from the same source with the same options and compiler.

    Raises
    ------
    SparsifierError
        If there is no compiler, or it refuses.
    """
    compiler = nvrtc.found()
    if compiler is None:
        raise SparsifierError("compiled kernels need NVRTC, which was not found beside torch")
    options = [f"-arch={arch}", *OPTIONS, *variant.defines]
    source = variant.source_text
    key = hashlib.sha256("\0".join([compiler.version, variant.kernel, *options, source]).encode()).hexdigest()
    file = cache_folder() / FOLDER / f"{key[:32]}.cubin"
    with suppress(OSError):
        kept = file.read_bytes()
        if kept[:4] == b"\x7fELF":
            return kept
    made = compiler.cubin(source, variant.kernel, options)
    with suppress(OSError):  # a cache that cannot be written to costs the next process a moment
        file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(file) as temporary:
            temporary.write_bytes(made)
    return made


@cache
def function(variant: Compilable, device: torch.device) -> driver.Function:
    """Gives the kernel on `device`."""
    with cuda_overlap.on(device):
        code = cubin(variant, architecture(device))
        return driver.Function(code, variant.kernel, variant.warps * 32, variant.chained)


def ready(device: torch.device) -> None:
    """Waits until what a layer consists of is there: its launches, which begin early, do not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
