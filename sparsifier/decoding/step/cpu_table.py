"""Runs the operations of one token, a whole model's, in one call of compiled code.

An operation is a row of integers (what to do, addresses, sizes) and two numbers. All addresses are of fp32 numbers, but
for those of weights, keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, njit

from resting.sparsifier.decoding import cpu_numba, cpu_quantised
from resting.sparsifier.decoding.cpu_numba import FASTMATH, compact, digest, dots, pointer
from resting.sparsifier.decoding.cpu_quantised_layout import WIDENING
from resting.sparsifier.decoding.step import cpu_codes as codes
from resting.sparsifier.decoding.step import cpu_kernels as kernels
from resting.sparsifier.decoding.step.cpu_kernels import OPTIONS, floats, matrix

COLUMNS, ROWS, GATED_ROWS, LOW_RANK, NORM, TURN, ATTEND, OPEN, MULTIPLY, ADD, STORE, MARK, CHOOSE = range(13)
"""Operations, the first entry of a row; the first three are products with weights, or with their codes."""
OP, X, N, Y, M, W = range(6)
"""Entries that mean the same for most: input and its size, output and its size, weights."""
CUTOFF, SHIFT, START, PARTS, GATE, LIMIT = range(6, 12)
"""Of products: the rule, what sums start from, threads, and the activated gate with its cutoff."""
RANK, V = PARTS, GATE
HEAD, BIAS, BOOK, SETS = W, CUTOFF, SHIFT, PARTS
"""Of a set of neurons that is chosen from a book; its sizes are of the input, and of the neurons."""
COUNT, GAIN, FIRST = M, W, CUTOFF
"""Of norms: of how many heads in turn."""
COS, SIN = W, CUTOFF
GROUPS, KEYS, VALUES, SIZE, STRIDE, WINDOW = M, W, CUTOFF, SHIFT, START, GATE
"""Of attention; N counts heads. New keys stand behind the queries, and new values behind the keys."""
KIND = M
BITS, GROUP, SCALES, HALF, ROW_BYTES, SKIP = range(12, 18)
"""Of products from codes, whose bits are not 0: the outputs of a group, where scales lie and whether as float16, bytes
from one row of codes to the next, and how many outputs of the first group come before the first row."""
ENTRIES = 18
_TIMES_HALF, _ADD_HALF = WIDENING[torch.float16]
_TIMES_BRAIN, _ADD_BRAIN = WIDENING[torch.bfloat16]


@njit(inline="always", **OPTIONS)
def _active(row: Any, like: Any, index: Any, value: Any) -> int:
    """Lists the inputs of a product that do not rest."""
    x, shift, cutoff = floats(row[X], row[N]), floats(row[SHIFT], row[N]), floats(row[CUTOFF], row[N])
    return kernels.active(x, shift, cutoff, like, index, value)


@njit(inline="always", **OPTIONS)
def _kept(row: Any, like: Any, wide: Any) -> Any:
    """Writes the masked input of a product whose weights are output-major."""
    x, shift, cutoff = floats(row[X], row[N]), floats(row[SHIFT], row[N]), floats(row[CUTOFF], row[N])
    kernels.kept(x, shift, cutoff, like, wide[: row[N]])
    return wide[: row[N]]


@njit(inline="always", **OPTIONS)
def _scales(row: Any, by_columns: bool) -> Any:
    """Shows the scales of a product."""
    groups = (row[SKIP] + row[M] + row[GROUP] - 1) // row[GROUP]
    shape = (row[N], groups) if by_columns else (groups, row[N])
    return carray(pointer(row[SCALES]), shape, np.uint16)


@njit(inline="always", **OPTIONS)
def _widening(row: Any) -> Any:
    """Gives what makes float32 of the bits of its scales."""
    if row[HALF]:
        return np.uint32(_TIMES_HALF), np.uint32(_ADD_HALF)
    return np.uint32(_TIMES_BRAIN), np.uint32(_ADD_BRAIN)


@njit(inline="always", **OPTIONS)
def _eight(row: Any, count: int) -> Any:
    return carray(pointer(row[W]), (count, row[ROW_BYTES]), np.int8)


@njit(inline="always", **OPTIONS)
def _four(row: Any, count: int) -> Any:
    return carray(pointer(row[W]), (count, row[ROW_BYTES]), np.uint8)


@njit(**OPTIONS)
def _columns(row: Any, index: Any, value: Any, n: int, start: Any, like: Any, y: Any, wide: Any) -> None:
    """Computes `by_columns` of a row of the table."""
    scales, (times, add) = _scales(row, True), _widening(row)
    group, inputs = row[GROUP], row[N]
    if row[BITS] == 8:
        codes.by_columns(_eight(row, inputs), scales, times, add, group, index, value, n, start, like, y, wide, 1)
    else:
        codes.by_columns(_four(row, inputs), scales, times, add, group, index, value, n, start, like, y, wide, 1)


@njit(**OPTIONS)
def _columns_parallel(row: Any, index: Any, value: Any, n: int, start: Any, like: Any, y: Any, wide: Any) -> None:
    """Computes `by_columns_parallel` of a row of the table."""
    scales, (times, add), parts = _scales(row, True), _widening(row), row[PARTS]
    group, inputs = row[GROUP], row[N]
    if row[BITS] == 8:
        codes.by_columns_parallel(
            _eight(row, inputs), scales, times, add, group, index, value, n, start, like, y, wide, parts
        )
    else:
        codes.by_columns_parallel(
            _four(row, inputs), scales, times, add, group, index, value, n, start, like, y, wide, parts
        )


@njit(**OPTIONS)
def _rows(row: Any, x: Any, index: Any, n: int, out: Any, wide: Any) -> None:
    """Computes `by_rows` of a row of the table."""
    scales, (times, add) = _scales(row, False), _widening(row)
    group, skip, outputs = row[GROUP], row[SKIP], row[M]
    if row[BITS] == 8:
        codes.by_rows(_eight(row, outputs), scales, times, add, group, skip, x, index, n, out, wide, 1)
    else:
        codes.by_rows(_four(row, outputs), scales, times, add, group, skip, x, index, n, out, wide, 1)


@njit(**OPTIONS)
def _rows_parallel(row: Any, x: Any, index: Any, n: int, out: Any, wide: Any) -> None:
    """Computes `by_rows_parallel` of a row of the table."""
    scales, (times, add), parts = _scales(row, False), _widening(row), row[PARTS]
    group, skip, outputs = row[GROUP], row[SKIP], row[M]
    if row[BITS] == 8:
        codes.by_rows_parallel(_eight(row, outputs), scales, times, add, group, skip, x, index, n, out, wide, parts)
    else:
        codes.by_rows_parallel(_four(row, outputs), scales, times, add, group, skip, x, index, n, out, wide, parts)


@njit(inline="always", **OPTIONS)
def _attend(row: Any, numbers: Any, like: Any, past: int, order: Any, scores: Any) -> None:
    """Stores the keys and values of the token, and attends."""
    heads, groups, size = row[N], row[GROUPS], row[SIZE]
    first, span = max(0, past + 1 - row[WINDOW]) if row[WINDOW] else 0, heads // groups * size
    x, out = floats(row[X], (heads + 2 * groups) * size), floats(row[Y], heads * size)
    for g in range(groups):
        at = g * row[STRIDE] * like.itemsize
        keys = matrix(row[KEYS] + at, past + 1, size, like)
        values = matrix(row[VALUES] + at, past + 1, size, like)
        new = (heads + g) * size
        kernels.store(x[new : new + size], keys[past])
        new += groups * size
        kernels.store(x[new : new + size], values[past])
        q, y = x[g * span : (g + 1) * span], out[g * span : (g + 1) * span]
        kernels.attend(q, keys, values, size, first, numbers[0], numbers[1], order, scores, y)


@njit(inline="always", **OPTIONS)
def _others(
    row: Any, numbers: Any, like: Any, past: int, order: Any, index: Any, value: Any, wide: Any, scores: Any
) -> None:
    """Runs an operation that is no product with weights."""
    op, x, y = row[OP], floats(row[X], row[N]), floats(row[Y], row[N])
    if op == LOW_RANK:
        u, v = matrix(row[W], row[RANK], row[M], like), matrix(row[V], row[N], row[RANK], like)
        start, out, cutoff = floats(row[START], row[M]), floats(row[Y], row[M]), floats(row[CUTOFF], row[N])
        kernels.low_rank(u, v, x, cutoff, start, out, order, index, value, wide)
    elif op == NORM:
        gain, count = floats(row[GAIN], row[N]), row[COUNT]
        x, y = floats(row[X], count * row[N]), floats(row[Y], count * row[N])
        for i in range(count):
            low, high = i * row[N], (i + 1) * row[N]
            kernels.norm(x[low:high], gain, numbers[0], row[FIRST] != 0, like, y[low:high])
    elif op == TURN:
        at = past * row[N] * 4
        cos, sin = floats(row[COS] + at, row[N]), floats(row[SIN] + at, row[N])
        size = row[SIZE]
        for i in range(row[COUNT]):
            kernels.turn(floats(row[X] + i * size * 4, size), cos, sin, like)
    elif op == ATTEND:
        _attend(row, numbers, like, past, order, scores)
    elif op == OPEN:
        kernels.opened(x, row[KIND], like)
    elif op == MULTIPLY:
        for i in range(x.size):
            y[i] = kernels.rounded(x[i] * y[i], like)
    elif op == ADD:
        factor = np.float32(numbers[0])
        for i in range(x.size):
            y[i] = kernels.rounded(y[i] + kernels.rounded(x[i] * factor, like), like)
    elif op == STORE:
        kernels.store(x, matrix(row[Y], 1, row[N], like)[0])
    elif op == MARK:
        kernels.mark(x, floats(row[CUTOFF], row[N]), y)
    elif op == CHOOSE:
        head, bias = floats(row[HEAD], row[SETS] * row[N]), floats(row[BIAS], row[SETS])
        book, chosen = floats(row[BOOK], row[SETS] * row[M]), floats(row[Y], row[M])
        kernels.choose(x, head, bias, book, order, wide, chosen)


def _compiled(parallel: bool, coded: bool, sources: int) -> Callable[..., int]:
    """Compiles what runs a table, on one thread or, `parallel`, on as many as the row of a product says.

    Products from codes are compiled where `coded` says that there are some: they take as long as all the rest. numba
    caches by the file of the function alone; `sources`, a digest of the files of all that is called, is a part of its
    key, since it is in the closure.
    """

    @njit(cache=True, fastmath=FASTMATH, nogil=True)
    def run(
        table: Any, numbers: Any, like: Any, past: int, order: Any, index: Any, value: Any, wide: Any, scores: Any
    ) -> int:
        for i in range(table.shape[0]):
            row = table[i]
            op, outputs = row[OP], row[M]
            if op > GATED_ROWS:
                _others(row, numbers[i], like, past, order, index, value, wide, scores)
                continue
            start, y = floats(row[START], outputs), floats(row[Y], outputs)
            if op == COLUMNS:
                n = _active(row, like, index, value)
                if coded:  # noqa: SIM102  a constant of its own: numba leaves the branch out
                    if row[BITS]:
                        if parallel:
                            _columns_parallel(row, index, value, n, start, like, y, wide)
                        else:
                            _columns(row, index, value, n, start, like, y, wide)
                        continue
                w = matrix(row[W], row[N], outputs, like)
                if parallel:
                    kernels.columns_parallel(w, index, value, n, start, y, row[PARTS])
                else:
                    kernels.columns(w, index, value, n, start, y, 0, outputs)
                continue
            x, w = _kept(row, like, wide), matrix(row[W], outputs, row[N], like)
            products, beyond = wide[row[N] : row[N] + outputs], wide[row[N] + outputs :]
            if op == ROWS:
                if coded:  # noqa: SIM102
                    if row[BITS]:
                        if parallel:
                            _rows_parallel(row, x, order, outputs, products, beyond)
                        else:
                            _rows(row, x, order, outputs, products, beyond)
                        codes.finish(products, start, like, y)
                        continue
                if parallel:
                    kernels.rows_parallel(w, x, order, start, y, row[PARTS])
                else:
                    kernels.rows(w, x, order, start, y, 0, outputs)
                continue
            limit = floats(row[LIMIT], outputs)
            n = compact(floats(row[GATE], outputs), limit[:0], limit, False, index, value)
            is_done = False
            if coded:  # noqa: SIM102
                if row[BITS]:
                    is_done = True
                    if parallel:
                        _rows_parallel(row, x, index, n, products, beyond)
                    else:
                        _rows(row, x, index, n, products, beyond)
            if not is_done:
                if parallel:
                    kernels.dots_parallel(w, x, index, n, products, row[PARTS])
                else:
                    dots(w, x, index, n, products, 0, n)
            kernels.gated(index, n, products, start, value, like, y)
        return sources

    return run


_sources = digest(cpu_numba, cpu_quantised, kernels, codes)
_runs = {
    (parallel, coded): _compiled(parallel, coded, _sources) for parallel in (False, True) for coded in (False, True)
}


def runner(threads: int, coded: bool) -> Callable[..., int]:
    """Gives what runs a table, compiled for one thread or more, and with products from codes where it has some."""
    return _runs[threads > 1, coded]
