"""Compiles CUDA C++ at run time by NVRTC, the compiler that comes with torch: nobody needs a toolkit."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from resting.sparsifier.errors import SparsifierError


class Nvrtc:
    """Compiles with one library.

    Parameters
    ----------
    library : str
        Path, or what the loader finds.

    Raises
    ------
    OSError
        If it cannot be loaded.
    """

    def __init__(self, library: str) -> None:
        self._lib = ctypes.CDLL(library)
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    @property
    def version(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"{major.value}.{minor.value}"

    def cubin(self, source: str, name: str, options: list[str]) -> bytes:
        """Compiles `source` to machine code.

        Raises
        ------
        SparsifierError
            With the compiler's words if it refuses.
        """
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), f"{name}.cu".encode(), 0, None, None)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._lib.nvrtcCompileProgram(program, len(options), given):
                log = self._bytes("nvrtcGetProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
                raise SparsifierError(f"NVRTC {self.version} does not compile the kernel {name}: {log}")
            return self._bytes("nvrtcGetCUBIN", program)
        finally:
            self._lib.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, getter: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{getter}Size", program, ctypes.byref(size))
        room = ctypes.create_string_buffer(size.value)
        self._call(getter, program, room)
        return room.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status:
            raise SparsifierError(f"NVRTC's {name} says: {self._lib.nvrtcGetErrorString(status).decode()}")


@cache
def found() -> Nvrtc | None:
    """Finds the library beside torch, in NVIDIA's packages, or where the loader looks; None where there is none."""
    for library in _candidates():
        try:
            return Nvrtc(library)
        except OSError:
            continue
    return None


def _candidates() -> Iterator[str]:
    major = (torch.version.cuda or "13").partition(".")[0]
    name = f"libnvrtc.so.{major}"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        yield from (str(path) for path in sorted(Path(folder).glob(f"*/lib/{name}*")))
    yield from (str(path) for path in sorted((Path(torch.__file__).parent / "lib").glob("libnvrtc*.so*")))
    yield name
