"""Computes products of one token from codes of 8 and 4 bits, for the step of a CPU: by columns, and by rows.

By columns, codes lie input-major and only those of active inputs are read. By rows, they lie output-major, and only
those of outputs that do not rest are; their scales, one for every input of a group of outputs, are read once a group.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import carray, njit, prange

from resting.sparsifier.decoding.cpu_numba import pointer, prefetch
from resting.sparsifier.decoding.cpu_quantised import ROWS, in_a_byte, stream
from resting.sparsifier.decoding.cpu_quantised_layout import LINE
from resting.sparsifier.decoding.step.cpu_kernels import OPTIONS, begin, rounded

AHEAD = 2
"""Lines of a row that are asked for before its turn: no processor guesses where the next active row begins."""
TILE = 8192
"""Outputs whose sums stay in a near cache while all active inputs are gone through: an output layer has far more."""
_EIGHT, _FOUR = ROWS[8], ROWS[4]


def scratch_by_columns(bits: int, groups: int, parts: int) -> int:
    """Counts the numbers of scratch that `by_columns` works in."""
    return ROWS[bits] * groups * parts


def scratch_by_rows(inputs: int, parts: int) -> int:
    """Counts the numbers of scratch that `by_rows` works in."""
    return (inputs + 1) * parts


@njit(**OPTIONS)
def _columns(
    codes: Any,
    scales: Any,
    times: Any,
    add: Any,
    group: int,
    index: Any,
    value: Any,
    n: int,
    start: Any,
    like: Any,
    y: Any,
    t: Any,
    first: int,
    last: int,
) -> None:
    """Computes the outputs of the groups in [first, last), rounded as the model's dtype does."""
    low, high = first * group, last * group
    begin(y, start, low, high)
    tile = max(1, TILE // group)
    for at in range(first, last, tile):
        stream(codes, scales, times, add, group, index, value, n, y, t, at, min(tile, last - at))
    for c in range(low, high):
        y[c] = rounded(y[c], like)


@njit(**OPTIONS)
def _part(codes: Any, wide: Any, groups: int, part: int) -> Any:
    """Shows the scratch of one thread."""
    at_once = _EIGHT if in_a_byte(codes) == 1 else _FOUR
    return carray(pointer(wide.ctypes.data + 4 * part * at_once * groups), (at_once, groups), np.float32)


@njit(**OPTIONS)
def by_columns(
    codes: Any,
    scales: Any,
    times: Any,
    add: Any,
    group: int,
    index: Any,
    value: Any,
    n: int,
    start: Any,
    like: Any,
    y: Any,
    wide: Any,
    parts: int,
) -> None:
    """Computes a product from the codes of the `n` inputs that do not rest."""
    groups = scales.shape[1]
    t = _part(codes, wide, groups, 0)
    _columns(codes, scales, times, add, group, index, value, n, start, like, y, t, 0, groups)


@njit(parallel=True, **OPTIONS)
def by_columns_parallel(
    codes: Any,
    scales: Any,
    times: Any,
    add: Any,
    group: int,
    index: Any,
    value: Any,
    n: int,
    start: Any,
    like: Any,
    y: Any,
    wide: Any,
    parts: int,
) -> None:
    """Computes `by_columns` with its groups of outputs in `parts` runs, one per thread."""
    groups = scales.shape[1]
    if parts == 1:  # no thread is woken
        t = _part(codes, wide, groups, 0)
        _columns(codes, scales, times, add, group, index, value, n, start, like, y, t, 0, groups)
        return
    for part in prange(parts):
        t = _part(codes, wide, groups, part)
        first, last = part * groups // parts, (part + 1) * groups // parts
        _columns(codes, scales, times, add, group, index, value, n, start, like, y, t, first, last)


@njit(inline="always", **OPTIONS)
def _low(both: Any) -> Any:
    """Gives the code in the low half of a byte; without the conversion a compiler works in 64 bits."""
    return np.float32(np.int32((both & 15) - 8))


@njit(inline="always", **OPTIONS)
def _high(both: Any) -> Any:
    return np.float32(np.int32((both >> 4) - 8))


@njit(**OPTIONS)
def _dot(codes: Any, scaled: Any, width: int, row: int) -> Any:
    """Computes the product of a row of codes with inputs that were scaled."""
    total = np.float32(0.0)
    if in_a_byte(codes) == 1:
        for c in range(width):
            total += scaled[c] * np.float32(codes[row, c])
    else:
        for c in range(width):
            both = np.int32(codes[row, c])
            total += scaled[c] * _low(both) + scaled[width + c] * _high(both)
    return total


@njit(**OPTIONS)
def _four_dots(codes: Any, scaled: Any, width: int, index: Any, out: Any, k: int) -> None:
    """Computes the products of four rows, the k-th chosen one and those after it."""
    i0, i1, i2, i3 = index[k], index[k + 1], index[k + 2], index[k + 3]
    a0 = a1 = a2 = a3 = np.float32(0.0)
    if in_a_byte(codes) == 1:
        for c in range(width):
            v = scaled[c]
            a0 += v * np.float32(codes[i0, c])
            a1 += v * np.float32(codes[i1, c])
            a2 += v * np.float32(codes[i2, c])
            a3 += v * np.float32(codes[i3, c])
    else:
        for c in range(width):
            v, w = scaled[c], scaled[width + c]
            b0, b1 = np.int32(codes[i0, c]), np.int32(codes[i1, c])
            b2, b3 = np.int32(codes[i2, c]), np.int32(codes[i3, c])
            a0 += v * _low(b0) + w * _high(b0)
            a1 += v * _low(b1) + w * _high(b1)
            a2 += v * _low(b2) + w * _high(b2)
            a3 += v * _low(b3) + w * _high(b3)
    out[k], out[k + 1], out[k + 2], out[k + 3] = a0, a1, a2, a3


@njit(**OPTIONS)
def _rows(
    codes: Any,
    scales: Any,
    times: Any,
    add: Any,
    group: int,
    skip: int,
    x: Any,
    index: Any,
    out: Any,
    scaled: Any,
    low: int,
    high: int,
) -> None:
    """Computes ``out[k]``, the product of row ``index[k]`` with `x`, for k in [low, high); rows come in order.

    Four rows of a group are gone through in each pass over its scaled inputs.
    """
    inputs, halves = x.size, in_a_byte(codes)
    width = (inputs + halves - 1) // halves
    scaled[inputs:] = np.float32(0.0)
    k = low
    while k < high:
        of = (index[k] + skip) // group
        for c in range(inputs):
            scaled[c] = x[c] * np.uint32(np.uint32(scales[of, c]) * times + add).view(np.float32)
        end = k + 1
        while end < high and (index[end] + skip) // group == of:
            end += 1
        while k + 4 <= end:
            for ahead in range(k + 4, min(k + 8, high)):
                at = codes.ctypes.data + index[ahead] * codes.shape[1]
                for line in range(AHEAD):
                    prefetch(at + LINE * line)
            _four_dots(codes, scaled, width, index, out, k)
            k += 4
        while k < end:
            out[k] = _dot(codes, scaled, width, index[k])
            k += 1


@njit(**OPTIONS)
def by_rows(
    codes: Any,
    scales: Any,
    times: Any,
    add: Any,
    group: int,
    skip: int,
    x: Any,
    index: Any,
    n: int,
    out: Any,
    wide: Any,
    parts: int,
) -> None:
    """Computes the products of `n` chosen rows with `x`; row 0 is the one after `skip` others of the first group."""
    _rows(codes, scales, times, add, group, skip, x, index, out, wide[: x.size + 1], 0, n)


@njit(parallel=True, **OPTIONS)
def by_rows_parallel(
    codes: Any,
    scales: Any,
    times: Any,
    add: Any,
    group: int,
    skip: int,
    x: Any,
    index: Any,
    n: int,
    out: Any,
    wide: Any,
    parts: int,
) -> None:
    """Computes `by_rows` in `parts` runs, one per thread."""
    size = x.size + 1
    if parts == 1:
        _rows(codes, scales, times, add, group, skip, x, index, out, wide[:size], 0, n)
        return
    for part in prange(parts):
        scaled = wide[part * size : (part + 1) * size]
        _rows(codes, scales, times, add, group, skip, x, index, out, scaled, part * n // parts, (part + 1) * n // parts)


@njit(**OPTIONS)
def finish(products: Any, start: Any, like: Any, y: Any) -> None:
    """Writes products of rows, plus what sums start from, rounded as the model's dtype does."""
    for k in range(y.size):
        y[k] = rounded(products[k] + start[k] if start.size else products[k], like)
