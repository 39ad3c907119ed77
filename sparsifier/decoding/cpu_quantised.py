"""Computes matrix-vector products on CPUs from codes of 8 and 4 bits, reading only the rows of active inputs.

Codes lie input-major with their scales: a resting input leaves both unread. A code is widened in registers and never
stored; sums are in fp32. Of 4 bits two codes lie in a byte, one of the first and one of the second half of a group, as
code + 8. Compiled by numba on first use.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from resting.sparsifier.decoding import cpu_numba
from resting.sparsifier.decoding.cpu_numba import OPTIONS, compact, digest, narrow, pointer, prefetch
from resting.sparsifier.decoding.cpu_quantised_layout import LANES, LINE

PART: dict[str, Any] = OPTIONS | {"cache": False}
"""Of what is compiled into a product, which is cached as a whole."""

ROWS = {8: 16, 4: 8}
"""Rows in each pass over the sums, by bits of a code: so many as registers hold beside what a pass works on."""
FLAGS = ("contract", "nsz")


@njit(**PART)
def _scaled(
    scales: Any,
    times: Any,
    add: Any,
    index: Any,
    value: Any,
    k: int,
    rows: int,
    first: int,
    count: int,
    all_rows: int,
    out: Any,
) -> None:
    """Computes the value times the scale of `rows` rows from the k-th on, for `count` groups from `first` on."""
    for r in range(rows):
        v = value[k + r]
        of = carray(pointer(scales.ctypes.data + 2 * (index[k + r] * scales.shape[1] + first)), (count,), np.uint16)
        for g in range(count):
            out[r, g] = v * np.uint32(np.uint32(of[g]) * times + add).view(np.float32)
    for r in range(rows, all_rows):
        for g in range(count):
            out[r, g] = np.float32(0.0)


@njit(**PART)
def _ask(codes: Any, scales: Any, index: Any, k: int, end: int, at: int, first: int) -> None:
    """Asks for the beginnings of the next rows, of codes from byte `at` on and of scales from group `first` on."""
    row, beside = codes.shape[1], scales.shape[1] * 2
    for ahead in range(k, end):
        prefetch(codes.ctypes.data + index[ahead] * row + at)
        prefetch(codes.ctypes.data + index[ahead] * row + at + LINE)
        prefetch(scales.ctypes.data + index[ahead] * beside + 2 * first)


@intrinsic
def add_rows(
    typing: Any, codes: Any, rows: Any, at: Any, factors: Any, apart: Any, sums: Any, groups: Any, group: Any
) -> Any:
    """Adds `ROWS` rows of codes to the sums of one group after the other.

    It is written in vectors, since a loop over one group is too short for what a compiler does around a loop of its
    own making.
    """
    signature = types.void(codes, rows, at, factors, apart, sums, groups, group)
    return signature, partial(_add_rows, 8 if codes.dtype.signed else 4)


def _add_rows(bits: int, context: Any, builder: Any, signature: Any, args: Any) -> Any:
    _, rows, at, factors, apart, sums, groups, group = args
    count = ROWS[bits]
    word, single = ir.IntType(64), ir.FloatType()
    wide, bytes_, ints = (ir.VectorType(kind, LANES) for kind in (single, ir.IntType(8), ir.IntType(32)))

    def constant(value: int) -> Any:
        return ir.Constant(word, value)

    def splat(value: Any) -> Any:
        one = builder.insert_element(ir.Constant(wide, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        return builder.shuffle_vector(one, one, ir.Constant(ints, [0] * LANES))

    def whole(value: int) -> Any:
        return ir.Constant(ints, [value] * LANES)

    def load(address: Any, kind: Any, align: int) -> Any:
        found = builder.load(builder.inttoptr(address, kind.as_pointer()))
        found.align = align
        return found

    def add_to(address: Any, codes: list[Any], by: list[Any], off: Any) -> None:
        """One sum after the other: the next lanes do not wait for it, and no addition is left over."""
        total = load(address, wide, 4)
        total = total if off is None else builder.fadd(total, off, flags=FLAGS)
        for code, factor in zip(codes, by):
            product = builder.fmul(builder.sitofp(code, wide), factor, flags=FLAGS)
            total = builder.fadd(total, product, flags=FLAGS)
        builder.store(total, builder.inttoptr(address, wide.as_pointer())).align = 4

    places = [builder.add(load(builder.add(rows, constant(8 * r)), word, 8), at) for r in range(2 * count)]
    starts, later = places[:count], places[count:]
    share = builder.lshr(group, constant(1)) if bits == 4 else group  # bytes of a group
    with cgutils.for_range(builder, groups, intp=word) as of_group:
        first = builder.add(factors, builder.mul(of_group.index, constant(4)))
        scalars = [load(builder.add(first, builder.mul(apart, constant(r))), single, 4) for r in range(count)]
        by = [splat(value) for value in scalars]
        off = None
        if bits == 4:
            total = scalars[0]
            for value in scalars[1:]:
                total = builder.fadd(total, value, flags=FLAGS)
            off = splat(builder.fmul(total, ir.Constant(single, -8.0), flags=FLAGS))
        offset = builder.mul(of_group.index, share)
        with builder.if_then(builder.icmp_unsigned("==", builder.and_(offset, constant(LINE - 1)), constant(0))):
            lines = builder.udiv(builder.add(share, constant(LINE - 1)), constant(LINE))
            with cgutils.for_range(builder, lines, intp=word) as line:
                place = builder.add(offset, builder.mul(line.index, constant(LINE)))
                for start in later:
                    _prefetch(builder, builder.add(start, place))
        out = builder.add(sums, builder.mul(builder.mul(of_group.index, group), constant(4)))
        with cgutils.for_range(builder, builder.udiv(share, constant(LANES)), intp=word) as step:
            here = builder.mul(step.index, constant(LANES))
            place = builder.add(offset, here)
            held = [load(builder.add(start, place), bytes_, 1) for start in starts]
            to = builder.add(out, builder.mul(here, constant(4)))
            if bits == 8:
                add_to(to, [builder.sext(codes, ints) for codes in held], by, None)
            else:
                both = [builder.zext(codes, ints) for codes in held]
                add_to(to, [builder.and_(codes, whole(15)) for codes in both], by, off)
                second = builder.add(to, builder.mul(share, constant(4)))
                add_to(second, [builder.lshr(codes, whole(4)) for codes in both], by, off)
    return context.get_dummy_value()


def _prefetch(builder: Any, address: Any) -> None:
    number = ir.IntType(32)
    wanted = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, number, number, number])
    function = builder.module.declare_intrinsic("llvm.prefetch", (cgutils.voidptr_t,), wanted)
    pointer = builder.inttoptr(address, cgutils.voidptr_t)
    builder.call(function, [pointer, *(ir.Constant(number, n) for n in (0, 2, 1))])


def in_a_byte(codes: Any) -> Any:
    """Counts the codes in a byte: those of 8 bits are signed, and two of 4 bits lie in one that is not."""


@overload(in_a_byte)
def _in_a_byte_of(codes: Any) -> Any:
    count = 1 if codes.dtype.signed else 2

    def counted(codes: Any) -> int:
        return count

    return counted


@njit(**PART)
def stream(
    codes: Any,
    scales: Any,
    times: Any,
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
    """Adds active rows to the sums of `count` groups from `first` on; `t` [`ROWS`, groups] is scratch."""
    start, row, end, all_rows = codes.ctypes.data, codes.shape[1], n - 1, t.shape[0]
    at = first * (group // in_a_byte(codes))
    where = np.empty(2 * all_rows, np.int64)  # these rows and the next, which are asked for ahead
    for k in range(0, n, all_rows):
        _ask(codes, scales, index, k + all_rows, min(k + 2 * all_rows, n), at, first)
        _scaled(scales, times, add, index, value, k, min(all_rows, n - k), first, count, all_rows, t)
        for r in range(2 * all_rows):  # behind the last active row it stands again, to be multiplied by 0
            where[r] = start + index[min(k + r, end)] * row
        sums_at, apart = sums.ctypes.data + 4 * first * group, 4 * t.shape[1]
        add_rows(codes, where.ctypes.data, at, t.ctypes.data, apart, sums_at, count, group)


@njit(inline="always")
def _begin(start: Any, sums: Any, low: int, high: int) -> None:
    for c in range(high - low):
        sums[low + c] = start[low + c] if start.size else np.float32(0.0)


@njit(inline="always")
def _end(sums: Any, out: Any, low: int, high: int) -> None:
    for c in range(high - low):
        out[low + c] = narrow(sums[low + c], out)


def _compiled(sources: int) -> tuple[Any, Any]:
    """Compiles the products of one token on one thread, and with groups of outputs in runs, one per thread.

    `sources` is a part of the key that numba caches by: see `digest`.
    """

    @njit(**OPTIONS)
    def gemv(
        codes: Any,
        scales: Any,
        times: Any,
        add: Any,
        group: int,
        like: Any,
        x: int,
        shift: Any,
        cutoff: Any,
        start: Any,
        y: int,
        index: Any,
        value: Any,
        sums: Any,
        t: Any,
    ) -> int:
        n = compact(carray(pointer(x), (codes.shape[0],), like.dtype), shift, cutoff, False, index, value)
        _begin(start, sums, 0, sums.size)
        stream(codes, scales, times, add, group, index, value, n, sums, t[0], 0, scales.shape[1])
        _end(sums, carray(pointer(y), (sums.size,), like.dtype), 0, sums.size)
        return n if sources else -1

    @njit(parallel=True, **OPTIONS)
    def gemv_parallel(
        codes: Any,
        scales: Any,
        times: Any,
        add: Any,
        group: int,
        like: Any,
        x: int,
        shift: Any,
        cutoff: Any,
        start: Any,
        y: int,
        index: Any,
        value: Any,
        sums: Any,
        t: Any,
        parts: int,
    ) -> int:
        n = compact(carray(pointer(x), (codes.shape[0],), like.dtype), shift, cutoff, False, index, value)
        out = carray(pointer(y), (sums.size,), like.dtype)
        groups = scales.shape[1]
        for part in prange(parts):
            first, last = part * groups // parts, (part + 1) * groups // parts
            _begin(start, sums, first * group, last * group)
            stream(codes, scales, times, add, group, index, value, n, sums, t[part], first, last - first)
            _end(sums, out, first * group, last * group)
        return n if sources else -1

    return gemv, gemv_parallel


gemv, gemv_parallel = _compiled(digest(cpu_numba))
