"""Computes what stands between the products of one token on a CPU: norms, rotary embedding, attention, gates.

Numbers of a token are fp32 throughout, rounded where a model in bfloat16 rounds. `like` is an array of the type that
weights, keys and values are stored as: float32, or uint16 that holds bfloat16. What is an address is an integer.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import carray, njit, prange

from resting.sparsifier.decoding.cpu_numba import (
    FASTMATH,
    compact,
    dots,
    narrow,
    pointer,
    stream,
    widen,
)

OPTIONS: dict[str, Any] = {"fastmath": FASTMATH, "nogil": True, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
"""They are compiled into what calls them, which is cached."""
SILU, GELU_TANH, GELU = range(3)
"""What opens a gate."""
KINDS = {"silu": SILU, "gelu_tanh": GELU_TANH, "gelu": GELU}


@njit(**OPTIONS)
def floats(address: int, n: int) -> Any:
    """Shows `n` fp32 numbers at an address; none if it is 0."""
    return carray(pointer(address), (n if address else 0,), np.float32)


@njit(**OPTIONS)
def matrix(address: int, rows: int, columns: int, like: Any) -> Any:
    """Shows stored numbers at an address."""
    return carray(pointer(address), (rows, columns), like.dtype)


@njit(**OPTIONS)
def rounded(v: Any, like: Any) -> Any:
    """Rounds an fp32 number as the model's dtype does."""
    return widen(narrow(v, like))


@njit(**OPTIONS)
def exp(v: Any) -> Any:
    """Computes the exponential in fp32 by a polynomial that a compiler makes vectors of.

    It is off by 1e-7 of itself near 0 and by 5e-6 at 88. It underflows to 1e-38, not to zero, and overflows to 2e38,
    not to infinity; NaN stays NaN.
    """
    t = v * np.float32(1.4426950408889634)
    t = np.float32(-126.0) if t < np.float32(-126.0) else t
    t = np.float32(127.0) if t > np.float32(127.0) else t
    whole = np.floor(t + np.float32(0.5))
    r = (t - whole) * np.float32(0.6931471805599453)
    p = np.float32(1.0 / 5040.0)
    p = p * r + np.float32(1.0 / 720.0)
    p = p * r + np.float32(1.0 / 120.0)
    p = p * r + np.float32(1.0 / 24.0)
    p = p * r + np.float32(1.0 / 6.0)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1.0)
    p = p * r + np.float32(1.0)
    shift = np.int32(0) if t != t else np.int32(whole)
    return p * np.int32((shift + np.int32(127)) << np.int32(23)).view(np.float32)


@njit(**OPTIONS)
def active(x: Any, shift: Any, cutoff: Any, like: Any, index: Any, value: Any) -> int:
    """Lists the inputs that do not rest, ``x - shift`` where its magnitude is above `cutoff`; NaN does not rest."""
    n = 0
    for i in range(x.size):
        v = x[i]
        if shift.size:
            v = rounded(v - shift[i], like)
        index[n] = i
        value[n] = v
        n += not abs(v) <= cutoff[i]
    return n


@njit(**OPTIONS)
def mark(x: Any, cutoff: Any, y: Any) -> None:
    """Writes 1 where the magnitude is above `cutoff`, or is NaN, and 0 elsewhere."""
    for i in range(x.size):
        y[i] = np.float32(not abs(x[i]) <= cutoff[i])


@njit(inline="always", **OPTIONS)
def choose(x: Any, head: Any, bias: Any, book: Any, order: Any, scores: Any, y: Any) -> None:
    """Writes the row of `book` [sets, neurons] for which ``head x + bias`` is largest, the first of equal ones."""
    sets, best = bias.size, 0
    dots(head.reshape(sets, x.size), x, order, sets, scores, 0, sets)
    for i in range(1, sets):
        if scores[i] + bias[i] > scores[best] + bias[best]:
            best = i
    y[:] = book[best * y.size : (best + 1) * y.size]


@njit(**OPTIONS)
def begin(y: Any, start: Any, low: int, high: int) -> None:
    """Writes what sums start from: a bias, a low-rank part, or nothing."""
    if start.size:
        y[low:high] = start[low:high]
    else:
        y[low:high] = 0.0


@njit(inline="always", **OPTIONS)
def columns(w: Any, index: Any, value: Any, n: int, start: Any, y: Any, low: int, high: int) -> None:
    """Computes some outputs of a product with `w` [in, out] from the inputs that do not rest."""
    begin(y, start, low, high)
    stream(w, index, value, n, y, low, high)
    for c in range(low, high):
        y[c] = rounded(y[c], w)


@njit(inline="always", **OPTIONS)
def low_rank(
    u: Any, v: Any, x: Any, cutoff: Any, start: Any, y: Any, order: Any, index: Any, value: Any, z: Any
) -> None:
    """Computes ``start + U V (x - x_kept)``, of V only the rows of inputs that rest; U and V are input-major."""
    n = compact(x, cutoff[:0], cutoff, True, index, value)
    z[: v.shape[1]] = 0.0
    stream(v, index, value, n, z, 0, v.shape[1])
    begin(y, start, 0, y.size)
    stream(u, order, z, u.shape[0], y, 0, y.size)


@njit(**OPTIONS)
def kept(x: Any, shift: Any, cutoff: Any, like: Any, out: Any) -> None:
    """Writes ``x - shift`` where it does not rest, else zero; without a cutoff, all of it."""
    for i in range(x.size):
        v = x[i]
        if shift.size:
            v = rounded(v - shift[i], like)
        out[i] = v
        if cutoff.size and abs(v) <= cutoff[i]:
            out[i] = 0.0


@njit(inline="always", **OPTIONS)
def rows(w: Any, x: Any, order: Any, start: Any, y: Any, low: int, high: int) -> None:
    """Computes ``start + W x`` with `w` [out, in], for the outputs in [low, high); `order` is 0, 1, 2, ..."""
    dots(w, x, order, high, y, low, high)
    for k in range(low, high):
        y[k] = rounded(y[k] + start[k] if start.size else y[k], w)


@njit(**OPTIONS)
def gated(index: Any, n: int, products: Any, start: Any, gate: Any, like: Any, y: Any) -> None:
    """Writes ``gate * (W x + start)`` of the `n` rows that do not rest, and zero for the others."""
    y[:] = 0.0
    for k in range(n):
        i = index[k]
        up = products[k] + start[i] if start.size else products[k]
        y[i] = rounded(gate[k] * rounded(up, like), like)


@njit(**OPTIONS)
def norm(x: Any, gain: Any, eps: float, first: bool, like: Any, y: Any) -> None:
    """Computes an RMSNorm; with `first` it rounds before the gain is multiplied, and after."""
    total = np.float32(0.0)
    for i in range(x.size):
        total += x[i] * x[i]
    rate = np.float32(1.0) / np.sqrt(total / np.float32(x.size) + np.float32(eps))
    for i in range(x.size):
        v = x[i] * rate
        if first:
            v = rounded(v, like)
        y[i] = rounded(v * gain[i], like)


@njit(**OPTIONS)
def turn(x: Any, cos: Any, sin: Any, like: Any) -> None:
    """Turns the first numbers of one head by the rotary embedding, in place."""
    half = cos.size // 2
    for i in range(half):
        low, high = x[i], x[i + half]
        x[i] = rounded(rounded(low * cos[i], like) - rounded(high * sin[i], like), like)
        x[i + half] = rounded(rounded(high * cos[i + half], like) + rounded(low * sin[i + half], like), like)


@njit(**OPTIONS)
def opened(gate: Any, kind: int, like: Any) -> None:
    """Applies the activation of a gate in place."""
    if kind == GELU:
        for i in range(gate.size):
            v = gate[i]
            gate[i] = rounded(np.float32(0.5) * v * np.float32(math.erfc(-v * 0.7071067811865476)), like)
        return
    # (1 + tanh(u)) / 2 is 1 / (1 + exp(-2 u)); what GELU adds to SiLU is a factor and the cube.
    factor, cubed = np.float32(1.0), np.float32(0.0)
    if kind == GELU_TANH:
        factor, cubed = np.float32(1.5957691216057308), np.float32(0.07135481282952542)
    for i in range(gate.size):
        v = gate[i]
        c = min(max(v, np.float32(-100.0)), np.float32(100.0))
        gate[i] = rounded(v / (np.float32(1.0) + exp(-(factor * v + cubed * c * c * c))), like)


@njit(inline="always", **OPTIONS)
def attend(
    q: Any,
    keys: Any,
    values: Any,
    size: int,
    first: int,
    scaling: float,
    softcap: float,
    order: Any,
    scores: Any,
    out: Any,
) -> None:
    """Computes the attention of the heads that share keys and values [n, size] to those from `first` on."""
    n = keys.shape[0]
    for head in range(q.size // size):
        x, y = q[head * size : (head + 1) * size], out[head * size : (head + 1) * size]
        dots(keys, x, order, n, scores, first, n)
        largest = np.float32(-np.inf)
        for j in range(first, n):
            v = scores[j] * np.float32(scaling)
            if softcap > 0.0:
                v = np.float32(math.tanh(v / np.float32(softcap))) * np.float32(softcap)
            scores[j] = v
            largest = max(largest, v)
        total = np.float32(0.0)
        for j in range(first, n):
            scores[j] = exp(scores[j] - largest)
            total += scores[j]
        y[:] = 0.0
        stream(values, order[first:], scores[first:], n - first, y, 0, size)
        for c in range(size):
            y[c] = rounded(y[c] / total, keys)


@njit(**OPTIONS)
def store(x: Any, out: Any) -> None:
    """Writes fp32 numbers as they are stored."""
    for i in range(x.size):
        out[i] = narrow(x[i], out)


@njit(parallel=True, **OPTIONS)
def columns_parallel(w: Any, index: Any, value: Any, n: int, start: Any, y: Any, parts: int) -> None:
    """Computes `columns` with its outputs in `parts` long runs, one per thread."""
    if parts == 1:  # no thread is woken
        columns(w, index, value, n, start, y, 0, y.size)
        return
    step = ((y.size + parts - 1) // parts + 15) // 16 * 16  # whole cache lines
    for part in prange(parts):
        low = min(part * step, y.size)
        columns(w, index, value, n, start, y, low, min(low + step, y.size))


@njit(parallel=True, **OPTIONS)
def rows_parallel(w: Any, x: Any, order: Any, start: Any, y: Any, parts: int) -> None:
    """Computes `rows` in `parts` runs, one per thread."""
    if parts == 1:
        rows(w, x, order, start, y, 0, y.size)
        return
    for part in prange(parts):
        rows(w, x, order, start, y, part * y.size // parts, (part + 1) * y.size // parts)


@njit(parallel=True, **OPTIONS)
def dots_parallel(w: Any, x: Any, index: Any, n: int, out: Any, parts: int) -> None:
    """Computes the products of `n` chosen rows in `parts` runs, one per thread."""
    if parts == 1:
        dots(w, x, index, n, out, 0, n)
        return
    for part in prange(parts):
        dots(w, x, index, n, out, part * n // parts, (part + 1) * n // parts)
