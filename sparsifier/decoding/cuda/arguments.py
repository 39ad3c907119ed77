"""Mirrors what the kernels are told, byte for byte: the structures `Arguments` of ``inputs.cu`` and ``stream.cu``."""

from __future__ import annotations

import ctypes

POINTERS = (
    "x",
    "weight",
    "cutoff",
    "shift",
    "gain",
    "start",
    "z",
    "u",
    "ranks",
    "y",
    "out",
    "counter",
    "zero",
    "scales",
)
FLOATS = ("eps", "x_unit", "z_unit", "steps", "y_unit", "limit")
INTEGERS = ("inputs", "outputs", "stride", "u_stride", "x_width", "z_width", "y_width", "zeros", "rows")


class ProductArguments(ctypes.Structure):
    """Holds the arguments of ``columns`` and ``rows``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_float) for name in FLOATS),
        *((name, ctypes.c_int) for name in INTEGERS),
        ("begins", ctypes.c_int * 2),
        ("tiles", ctypes.c_int * 2),
        ("half_scales", ctypes.c_int),
    )


class StreamArguments(ctypes.Structure):
    """Holds the arguments of ``begin`` and ``finish``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "low", "squares")),
        *((name, ctypes.c_float) for name in ("steps", "unit", "limit")),
        *((name, ctypes.c_int) for name in ("count", "width")),
    )
