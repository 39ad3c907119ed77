"""Loads compiled kernels and launches them through CUDA's driver, on torch's current stream."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

from resting.sparsifier.errors import SparsifierError

PROGRAMMATIC_STREAM_SERIALIZATION = 6
"""The launch attribute that lets a launch begin while the one before it ends."""


class LaunchAttribute(ctypes.Structure):
    """Mirrors ``CUlaunchAttribute``: a number, and a value in a union of 64 bytes at 8."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_char * 4), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60))


class LaunchConfig(ctypes.Structure):
    """Mirrors ``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


@cache
def library() -> ctypes.CDLL | None:
    """Gives the driver's library, or None where there is none."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None


def can_launch() -> bool:
    """Tells whether the driver knows launch attributes, as those of CUDA 11.8 and later do."""
    return library() is not None and hasattr(library(), "cuLaunchKernelEx")


def check(status: int, what: str) -> None:
    """Raises what the driver says.

    Raises
    ------
    SparsifierError
    """
    if status:
        text = ctypes.c_char_p()
        lib = library()
        assert lib is not None
        lib.cuGetErrorString(status, ctypes.byref(text))
        raise SparsifierError(f"CUDA's driver cannot {what}: {(text.value or b'error %d' % status).decode()}")


class Function:
    """Is a kernel in a GPU's memory.

    Parameters
    ----------
    cubin : bytes
    name : str
    threads : int
        Of a program.
    chained : bool
        Whether launches begin while the one before ends.

    The GPU is torch's current one, and stays the function's.
    """

    def __init__(self, cubin: bytes, name: str, threads: int, chained: bool) -> None:
        lib = library()
        assert lib is not None
        torch.cuda.current_stream()  # the driver's context is there from now on
        self._lib, self._name = lib, name
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        check(lib.cuModuleLoadData(ctypes.byref(self._module), cubin), f"load the kernel {name}")
        found = lib.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
        check(found, f"find the kernel {name}")
        self._attribute = LaunchAttribute(id=PROGRAMMATIC_STREAM_SERIALIZATION, value=1)
        self._config = LaunchConfig(
            block=(threads, 1, 1), attributes=ctypes.pointer(self._attribute), count=int(chained)
        )

    def __call__(self, grid: tuple[int, int], arguments: ctypes.Structure) -> None:
        """Launches as many programs as `grid` says; `arguments` are copied."""
        self._config.grid[:] = (*grid, 1)
        self._config.stream = torch.cuda.current_stream().cuda_stream
        pointers = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        status = self._lib.cuLaunchKernelEx(ctypes.byref(self._config), self._function, pointers, None)
        if status:
            check(status, f"launch the kernel {self._name}")
