"""Computes matrix-vector products on CPUs from codes of 8 and 4 bits, reading only the rows of active inputs.

Codes lie input-major with their scales: a resting input leaves both unread. A code is widened in registers and never
stored; sums are in fp32. Of 4 bits two codes lie in a byte, one of the first and one of the second half of a group, as
code + 8. Compiled by numba on first use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit

from resting.sparsifier.decoding.cpu_numba import OPTIONS, pointer, prefetch

ROWS = 8
"""Rows in each pass over the sums."""
LINE = 64


@njit(**OPTIONS)
def _scaled(
    scales: Any, move: Any, add: Any, index: Any, value: Any, k: int, rows: int, first: int, count: int, out: Any
) -> None:
    """Computes the value times the scale of `rows` rows from the k-th on, for `count` groups from `first` on."""
    for r in range(rows):
        v = value[k + r]
        of = carray(pointer(scales.ctypes.data + 2 * (index[k + r] * scales.shape[1] + first)), (count,), np.uint16)
        for g in range(count):
            out[r, g] = v * np.uint32((np.uint32(of[g]) << move) + add).view(np.float32)
    for r in range(rows, ROWS):
        for g in range(count):
            out[r, g] = np.float32(0.0)


@njit(**OPTIONS)
def _ask(codes: Any, scales: Any, index: Any, k: int, n: int, at: int, first: int) -> None:
    """Asks for the beginnings of the next rows, of codes from byte `at` on and of scales from group `first` on."""
    row, beside = codes.shape[1], scales.shape[1] * 2
    for ahead in range(k, min(k + ROWS, n)):
        prefetch(codes.ctypes.data + index[ahead] * row + at)
        prefetch(codes.ctypes.data + index[ahead] * row + at + LINE)
        prefetch(scales.ctypes.data + index[ahead] * beside + 2 * first)


@njit(inline="always")
def _rows(codes: Any, index: Any, k: int, n: int, at: int, shape: Any) -> Any:
    """Shows eight rows from byte `at` on; behind the last active one it stands again, to be multiplied by 0."""
    start, row, end = codes.ctypes.data + at, codes.shape[1], n - 1
    return (
        carray(pointer(start + index[k] * row), shape, codes.dtype),
        carray(pointer(start + index[min(k + 1, end)] * row), shape, codes.dtype),
        carray(pointer(start + index[min(k + 2, end)] * row), shape, codes.dtype),
        carray(pointer(start + index[min(k + 3, end)] * row), shape, codes.dtype),
        carray(pointer(start + index[min(k + 4, end)] * row), shape, codes.dtype),
        carray(pointer(start + index[min(k + 5, end)] * row), shape, codes.dtype),
        carray(pointer(start + index[min(k + 6, end)] * row), shape, codes.dtype),
        carray(pointer(start + index[min(k + 7, end)] * row), shape, codes.dtype),
    )


@njit(**OPTIONS)
def stream8(
    codes: Any,
    scales: Any,
    move: Any,
    add: Any,
    group: int,
    index: Any,
    value: Any,
    n: int,
    sums: Any,
    t: Any,
    first: int,
    count: int,
) -> None:
    """Adds the active rows of codes of 8 bits to the sums of `count` groups from `first` on, eight in each pass."""
    y = carray(pointer(sums.ctypes.data + 4 * first * group), (count, group), np.float32)
    for k in range(0, n, ROWS):
        _ask(codes, scales, index, k + ROWS, n, first * group, first)
        _scaled(scales, move, add, index, value, k, min(ROWS, n - k), first, count, t)
        a0, a1, a2, a3, a4, a5, a6, a7 = _rows(codes, index, k, n, first * group, (count, group))
        for g in range(count):
            t0, t1, t2, t3, t4, t5, t6, t7 = t[0, g], t[1, g], t[2, g], t[3, g], t[4, g], t[5, g], t[6, g], t[7, g]
            for c in range(group):
                y[g, c] += (
                    (t0 * np.float32(a0[g, c]) + t1 * np.float32(a1[g, c]))
                    + (t2 * np.float32(a2[g, c]) + t3 * np.float32(a3[g, c]))
                ) + (
                    (t4 * np.float32(a4[g, c]) + t5 * np.float32(a5[g, c]))
                    + (t6 * np.float32(a6[g, c]) + t7 * np.float32(a7[g, c]))
                )


@njit(inline="always")
def _low(code: Any) -> Any:
    return np.float32(np.int32(code & 15))


@njit(inline="always")
def _high(code: Any) -> Any:
    return np.float32(np.int32(code >> 4))


@njit(**OPTIONS)
def stream4(
    codes: Any,
    scales: Any,
    move: Any,
    add: Any,
    group: int,
    index: Any,
    value: Any,
    n: int,
    sums: Any,
    t: Any,
    first: int,
    count: int,
) -> None:
    """Adds the active rows of codes of 4 bits likewise; what the 8 in every code adds is taken off group by group."""
    half = group // 2
    y = carray(pointer(sums.ctypes.data + 4 * first * group), (count, 2, half), np.float32)
    for k in range(0, n, ROWS):
        _ask(codes, scales, index, k + ROWS, n, first * half, first)
        _scaled(scales, move, add, index, value, k, min(ROWS, n - k), first, count, t)
        a0, a1, a2, a3, a4, a5, a6, a7 = _rows(codes, index, k, n, first * half, (count, half))
        for g in range(count):
            t0, t1, t2, t3, t4, t5, t6, t7 = t[0, g], t[1, g], t[2, g], t[3, g], t[4, g], t[5, g], t[6, g], t[7, g]
            off = np.float32(8.0) * (((t0 + t1) + (t2 + t3)) + ((t4 + t5) + (t6 + t7)))
            for c in range(half):
                y[g, 0, c] += (
                    (t0 * _low(a0[g, c]) + t1 * _low(a1[g, c])) + (t2 * _low(a2[g, c]) + t3 * _low(a3[g, c]))
                ) + ((t4 * _low(a4[g, c]) + t5 * _low(a5[g, c])) + (t6 * _low(a6[g, c]) + t7 * _low(a7[g, c]) - off))
            for c in range(half):  # the same bytes again, from the nearest cache
                y[g, 1, c] += (
                    (t0 * _high(a0[g, c]) + t1 * _high(a1[g, c])) + (t2 * _high(a2[g, c]) + t3 * _high(a3[g, c]))
                ) + (
                    (t4 * _high(a4[g, c]) + t5 * _high(a5[g, c])) + (t6 * _high(a6[g, c]) + t7 * _high(a7[g, c]) - off)
                )
