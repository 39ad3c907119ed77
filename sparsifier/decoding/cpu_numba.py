"""Computes matrix-vector products on CPUs that read only the weights of active inputs.

Weights are kept input-major, [in, out]: the weights of one input are one contiguous run, and those of a resting input
are never touched. Sums are in fp32 whatever the weights are; bfloat16 is passed as the uint16 of its bits. Compiled by
numba on first use (and cached by it), so that no compiler is needed.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

# Sums may be reordered; NaN and infinity keep their meaning, unlike under plain fastmath.
FASTMATH = {"contract", "reassoc", "nsz", "arcp"}
OPTIONS: dict[str, Any] = {"fastmath": FASTMATH, "nogil": True, "cache": True}


def digest(*modules: ModuleType) -> int:
    """Computes a number of the files of modules, for the closure of what calls their functions.

    numba caches by the file of a function alone, and by the numbers in its closure.
    """
    return int(
        hashlib.sha256(b"".join(Path(str(module.__file__)).read_bytes() for module in modules)).hexdigest()[:15], 16
    )


@intrinsic
def pointer(typing: Any, address: Any) -> Any:
    """Turns an address into a pointer: tensors that change with every call come as integers, which is cheaper."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), code


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Asks for the cache line at an address, which is not read if there is no memory."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer, number = builder.inttoptr(args[0], cgutils.voidptr_t), ir.IntType(32)
        wanted = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
        function = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), wanted)
        builder.call(function, [pointer, *(ir.Constant(number, n) for n in (0, 3, 1))])  # to read, kept, data
        return context.get_dummy_value()

    return types.void(address), code


def widen(v: Any) -> Any:
    """Converts a stored number to fp32."""


@overload(widen, inline="never")
def _widen_of(v: Any) -> Any:
    def shifted(v: Any) -> Any:
        return np.uint32(np.uint32(v) << np.uint32(16)).view(np.float32)

    def same(v: Any) -> Any:
        return v

    return shifted if isinstance(v, types.Integer) else same


def narrow(v: Any, like: Any) -> Any:
    """Rounds an fp32 number to what arrays such as `like` store: to nearest, ties to even."""


@overload(narrow, inline="never")
def _narrow_of(v: Any, like: Any) -> Any:
    def rounded(v: Any, like: Any) -> Any:
        bits = np.float32(v).view(np.uint32)
        if v != v:
            return np.uint16(0x7FC0)
        return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))

    def same(v: Any, like: Any) -> Any:
        return v

    return rounded if isinstance(like.dtype, types.Integer) else same


@njit(**OPTIONS)
def compact(x: Any, shift: Any, cutoff: Any, resting: bool, index: Any, value: Any) -> int:
    """Lists the active inputs, ``x - shift`` where its magnitude is above `cutoff` (NaN passes), or the others."""
    n = 0
    for i in range(x.size):
        v = widen(x[i])
        if shift.size:
            v = widen(narrow(v - shift[i], x))
        index[n] = i
        value[n] = v
        n += (abs(v) <= cutoff[i]) == resting
    return n


@njit(**OPTIONS)
def stream(w: Any, index: Any, value: Any, n: int, y: Any, low: int, high: int) -> None:
    """Adds the sum of ``value[k] w[index[k], low:high]`` to ``y[low:high]``, eight rows in each pass over y.

    The beginnings of the next eight are asked for ahead: no processor guesses where the next active row begins.
    """
    at, row = w.ctypes.data + low * w.itemsize, w.shape[1] * w.itemsize
    k = 0
    while k + 8 <= n:
        for ahead in range(k + 8, min(k + 16, n)):
            prefetch(at + index[ahead] * row)
        i0, i1, i2, i3 = index[k], index[k + 1], index[k + 2], index[k + 3]
        i4, i5, i6, i7 = index[k + 4], index[k + 5], index[k + 6], index[k + 7]
        v0, v1, v2, v3 = value[k], value[k + 1], value[k + 2], value[k + 3]
        v4, v5, v6, v7 = value[k + 4], value[k + 5], value[k + 6], value[k + 7]
        for c in range(low, high):
            y[c] += (v0 * widen(w[i0, c]) + v1 * widen(w[i1, c]) + v2 * widen(w[i2, c]) + v3 * widen(w[i3, c])) + (
                v4 * widen(w[i4, c]) + v5 * widen(w[i5, c]) + v6 * widen(w[i6, c]) + v7 * widen(w[i7, c])
            )
        k += 8
    while k < n:
        i0, v0 = index[k], value[k]
        for c in range(low, high):
            y[c] += v0 * widen(w[i0, c])
        k += 1


@njit(**OPTIONS)
def _columns(w: Any, index: Any, value: Any, n: int, start: Any, y: Any, out: Any, low: int, high: int) -> None:
    """Computes one part of the outputs: the initial value, plus the active rows of `w`, rounded as it is stored."""
    if start.size:
        y[low:high] = start[low:high]
    else:
        y[low:high] = 0.0
    stream(w, index, value, n, y, low, high)
    for c in range(low, high):
        out[c] = narrow(y[c], out)


@njit(**OPTIONS)
def gemv(w: Any, x: int, shift: Any, cutoff: Any, start: Any, y: int, index: Any, value: Any, sums: Any) -> int:
    r"""Computes the masked product of one token, :math:`y = start + W ((x - shift) \odot [|x - shift| > cutoff])`.

    Parameters
    ----------
    w : array [in, out]
        float32, or uint16 that holds bfloat16.
    x, y : int
        Addresses of [in] and [out] numbers as stored in `w`.
    shift : float32 array [in], or empty
    cutoff : float32 array [in]
        `Rule.cutoff`; -1 keeps everything.
    start : float32 array [out], or empty
        What the sums start from: a bias, or a low-rank part.
    index, value, sums : int64 array [in + 1], float32 array [in + 1], float32 array [out]
        Scratch.

    Returns
    -------
    int
        Number of active inputs.
    """
    n = compact(carray(pointer(x), (w.shape[0],), w.dtype), shift, cutoff, False, index, value)
    _columns(w, index, value, n, start, sums, carray(pointer(y), (w.shape[1],), w.dtype), 0, w.shape[1])
    return n


@njit(parallel=True, **OPTIONS)
def gemv_parallel(
    w: Any, x: int, shift: Any, cutoff: Any, start: Any, y: int, index: Any, value: Any, sums: Any, parts: int
) -> int:
    """Computes `gemv` with its outputs in `parts` long runs, one per thread."""
    n = compact(carray(pointer(x), (w.shape[0],), w.dtype), shift, cutoff, False, index, value)
    out = carray(pointer(y), (w.shape[1],), w.dtype)
    step = ((out.size + parts - 1) // parts + 15) // 16 * 16  # whole cache lines of fp32
    for part in prange(parts):
        low = min(part * step, out.size)  # a narrow layer leaves the last parts nothing
        _columns(w, index, value, n, start, sums, out, low, min(low + step, out.size))
    return n


@njit(**OPTIONS)
def low_rank(u: Any, v: Any, x: int, cutoff: Any, start: Any, y: Any, index: Any, value: Any, z: Any) -> None:
    r"""Computes what stands in for resting inputs, :math:`y = start + U V (x - x_{kept})`, for `gemv` to start from.

    Parameters
    ----------
    u, v : arrays [rank, out], [in, rank]
        Both input-major: of V, too, only the rows of resting inputs are read.
    x : int
        Address of [in] numbers as stored in `v`.
    cutoff, start
        As for `gemv`.
    y, index, value, z : float32 [out], int64 [in + 1], float32 [in + 1], float32 [rank] arrays
        The result, and scratch.
    """
    n = compact(carray(pointer(x), (v.shape[0],), v.dtype), cutoff[:0], cutoff, True, index, value)
    z[:] = 0.0
    stream(v, index, value, n, z, 0, z.size)
    if start.size:
        y[:] = start
    else:
        y[:] = 0.0
    for k in range(z.size):
        index[k] = k
    stream(u, index, z, z.size, y, 0, y.size)


@njit(**OPTIONS)
def dots(w: Any, x: Any, index: Any, n: int, out: Any, low: int, high: int) -> None:
    """Computes ``out[k] = w[index[k]] @ x`` for k in [low, high), four rows in each pass over x."""
    k = low
    while k + 4 <= high:
        i0, i1, i2, i3 = index[k], index[k + 1], index[k + 2], index[k + 3]
        a0 = a1 = a2 = a3 = np.float32(0.0)
        for c in range(x.size):
            v = x[c]
            a0 += v * widen(w[i0, c])
            a1 += v * widen(w[i1, c])
            a2 += v * widen(w[i2, c])
            a3 += v * widen(w[i3, c])
        out[k], out[k + 1], out[k + 2], out[k + 3] = a0, a1, a2, a3
        k += 4
    while k < high:
        i0 = index[k]
        a0 = np.float32(0.0)
        for c in range(x.size):
            a0 += x[c] * widen(w[i0, c])
        out[k] = a0
        k += 1


@njit(**OPTIONS)
def _hadamard(like: Any, start: Any, index: Any, gate: Any, products: Any, n: int, y: Any) -> None:
    """Multiplies gate and up at active rows, rounded where the masked form rounds, and writes zero at the others."""
    y[:] = narrow(np.float32(0.0), like)
    for k in range(n):
        i = index[k]
        up = products[k] + start[i] if start.size else products[k]
        y[i] = narrow(gate[k] * widen(narrow(up, like)), like)


@njit(**OPTIONS)
def gated_rows(
    w: Any, x: int, gate: int, cutoff: Any, start: Any, y: int, index: Any, value: Any, products: Any, wide: Any
) -> int:
    r"""Computes the rows of ``up`` under a mask of the activated gate.

    They are :math:`y = a \odot (W x + start)` where :math:`|a| > cutoff`, else 0.

    Parameters
    ----------
    w : array [rows, in]
        Output-major: a row that rests is not read.
    x, gate, y : int
        Addresses of [in], [rows] and [rows] numbers; `gate` is the activated gate a.
    cutoff : float32 array [rows]
    start : float32 array [rows], or empty
    index, value, products, wide : int64 [rows + 1], float32 [rows + 1], float32 [rows], float32 [in] arrays
        Scratch.

    Returns
    -------
    int
        Number of active rows; the product with ``down`` reads the same ones, the zeros of y being at rest.
    """
    inputs = carray(pointer(x), (w.shape[1],), w.dtype)
    for c in range(inputs.size):
        wide[c] = widen(inputs[c])
    n = compact(carray(pointer(gate), (w.shape[0],), w.dtype), cutoff[:0], cutoff, False, index, value)
    dots(w, wide, index, n, products, 0, n)
    _hadamard(w, start, index, value, products, n, carray(pointer(y), (w.shape[0],), w.dtype))
    return n


@njit(parallel=True, **OPTIONS)
def gated_rows_parallel(
    w: Any,
    x: int,
    gate: int,
    cutoff: Any,
    start: Any,
    y: int,
    index: Any,
    value: Any,
    products: Any,
    wide: Any,
    parts: int,
) -> int:
    """Computes `gated_rows` with its active rows in `parts` runs, one per thread."""
    inputs = carray(pointer(x), (w.shape[1],), w.dtype)
    for c in range(inputs.size):
        wide[c] = widen(inputs[c])
    n = compact(carray(pointer(gate), (w.shape[0],), w.dtype), cutoff[:0], cutoff, False, index, value)
    for part in prange(parts):
        dots(w, wide, index, n, products, part * n // parts, (part + 1) * n // parts)
    _hadamard(w, start, index, value, products, n, carray(pointer(y), (w.shape[0],), w.dtype))
    return n
