"""Runs compiled kernels on the processor: the same source, compiled by a C++ compiler, its threads taking turns."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.resources import files
from pathlib import Path

from resting.sparsifier.decoding.cuda.variant import PARTS

COMPILER = shutil.which("g++") or shutil.which("clang++")
FOLDER = Path(tempfile.gettempdir()) / "resting-host-kernels"
LEAN = ("-shared", "-fPIC", "-fno-exceptions", "-U_FORTIFY_SOURCE")  # which takes a jump between stacks for an error
END = """
extern "C" void begin_thread() { KERNEL(*given); now->done = true; leave(); }
"""


class HostFunction:
    """Stands for `driver.Function`. Programs run in an order that differs from call to call."""

    def __init__(self, library, threads):
        self._run, self._threads, self._calls = ctypes.CDLL(str(library)).run_programs, threads, 0

    def __call__(self, grid, arguments):
        count = grid[0] * grid[1]
        self._calls += 1
        first, step = (0, 1) if self._calls % 2 else (count - 1, count - 1)  # backwards
        self._run(*grid, self._threads, ctypes.byref(arguments), first, step or 1)


@cache
def host_function(variant, device):
    """Stands for `compiled.function`."""
    folder = files("resting.sparsifier.decoding.cuda")
    header = Path(__file__).with_name("host_cuda.hpp").read_text()
    if variant.kernel == "quantised_columns" or getattr(variant, "bits", 16) < 16:
        header += Path(__file__).with_name("host_quantised.hpp").read_text()
    parts = [(folder / name).read_text() for name in PARTS[variant.kernel] if not name.endswith("machine.cu")]
    source = "\n".join([header, *parts, END])
    defines = [*variant.defines, f"-DKERNEL={variant.kernel}"]
    key = hashlib.sha256("\0".join([source, *defines]).encode()).hexdigest()[:24]
    library = FOLDER / f"{key}.so"
    if not library.exists():
        FOLDER.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}.tmp")  # others may compile the same
        command = [COMPILER, "-std=c++17", "-O1", *LEAN, "-w", *defines, "-x", "c++", "-", "-o", made]
        subprocess.run(command, input=source.encode(), check=True)
        made.replace(library)
    return HostFunction(library, variant.warps * 32)
