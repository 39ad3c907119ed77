"""Writes the table of operations of one token, and holds all that it points to."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from resting.sparsifier.decoding.break_even import threads_for, threads_for_codes
from resting.sparsifier.decoding.cpu_quantised_layout import Laid, by_inputs, by_outputs
from resting.sparsifier.decoding.step import cpu_codes
from resting.sparsifier.decoding.step import cpu_table as ops
from resting.sparsifier.decoding.step.cpu_weights import Matrix
from resting.sparsifier.decoding.step.form import Norm
from resting.sparsifier.meter import PLAIN_BITS
from resting.sparsifier.rule import Rule, Vector

ALWAYS_PARALLEL = 1 << 22
"""Weights of 16 bits from which on waking threads is not worth a thought, nor a measurement."""
FLOAT = 4
"""Bytes of a number of a token."""


class CpuProgram:
    """Collects operations; addresses are integers, and what they point to is held here.

    Parameters
    ----------
    dtype : torch.dtype
        float32 or bfloat16.
    threads : int

    Attributes
    ----------
    longest : int
        Rows that are gone through in order, at most.
    turns : dict of str to list of int
        Operations that read a rotary table, by its name.
    attentions : list of int
        Operations that read and write keys and values, block by block.
    """

    def __init__(self, dtype: torch.dtype, threads: int) -> None:
        self.dtype, self.threads = dtype, threads
        self._rows: list[list[int]] = []
        self._numbers: list[tuple[float, float]] = []
        self._held: list[Tensor | np.ndarray] = []
        self._vectors: dict[tuple[float, int], int] = {}
        self._listed, self._wide, self.longest = 1, 1, 1
        self.turns: dict[str, list[int]] = {}
        self.attentions: list[int] = []

    def finished(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Gives the table, its numbers, an array of the stored type, and scratch."""
        like = np.zeros(1, np.uint16 if self.dtype == torch.bfloat16 else np.float32)
        scratch = np.empty(self._listed, np.int64), np.empty(self._listed, np.float32), np.empty(self._wide, np.float32)
        return np.array(self._rows, np.int64), np.array(self._numbers, np.float64), like, scratch

    def buffer(self, n: int) -> int:
        """Makes room for `n` fp32 numbers."""
        return self.hold(torch.zeros(n))

    def hold(self, tensor: Tensor) -> int:
        """Keeps a tensor, and gives its address."""
        self._held.append(tensor)
        return tensor.data_ptr()

    def hold_codes(self, laid: Laid) -> tuple[int, int]:
        """Keeps codes and scales, and gives the addresses of both."""
        self._held += [laid.codes, laid.scales]
        return laid.codes.ctypes.data, laid.scales.ctypes.data

    def vector(self, value: Vector | None, n: int) -> int:
        """Copies a vector to fp32; one number is repeated, and None has the address 0."""
        if value is None:
            return 0
        if isinstance(value, Tensor) and value.dim():
            return self.hold(value.detach().cpu().float().expand(n).contiguous().clone())
        key = float(value), n
        if key not in self._vectors:
            self._vectors[key] = self.hold(torch.full((n,), key[0]))
        return self._vectors[key]

    def product(self, matrix: Matrix, x: int, y: int) -> None:
        """Adds the product of a matrix with the numbers at `x`."""
        out, inputs = matrix.weight.shape
        if not matrix.by_columns:
            self._by_rows(ops.ROWS, matrix, slice(0, out), x, y)
            return
        cutoff, start = self.vector(matrix.cutoff, inputs), self.vector(matrix.start, out)
        if matrix.rule.low_rank is not None:
            start = self._low_rank(matrix, x, cutoff, start)
        shift, parts = self._shift(matrix.rule, inputs), self._parts(matrix)
        self._listed = max(self._listed, inputs + 1)
        if matrix.codes is None:
            weight = self.hold(matrix.weight.detach())
            self._add(ops.COLUMNS, x, inputs, y, out, weight, cutoff, shift, start, parts)
            return
        laid, form = by_inputs(matrix.codes), matrix.codes.format
        scratch = cpu_codes.scratch_by_columns(form.bits, laid.scales.shape[1], parts)
        self._wide = max(self._wide, scratch)
        codes, scales = self.hold_codes(laid)
        self._add(ops.COLUMNS, x, inputs, y, out, codes, cutoff, shift, start, parts, 0, 0, *_of(laid, matrix, scales))

    def gated(self, matrix: Matrix, half: slice, limit: Vector, x: int, gate: int, y: int) -> None:
        """Adds the rows `half` of a matrix where the activated gate is above `limit`, times that gate."""
        rows = half.stop - half.start
        self._listed = max(self._listed, rows + 1)
        self._by_rows(ops.GATED_ROWS, matrix, half, x, y, gate, self.vector(limit, rows))

    def rows(self, matrix: Matrix, half: slice, x: int, y: int) -> None:
        """Adds the rows `half` of a matrix that is kept output-major."""
        self._by_rows(ops.ROWS, matrix, half, x, y)

    def _by_rows(self, op: int, matrix: Matrix, half: slice, x: int, y: int, gate: int = 0, limit: int = 0) -> None:
        inputs, rows, parts = matrix.weight.shape[1], half.stop - half.start, self._parts(matrix, half)
        self.longest = max(self.longest, rows)
        cutoff = 0 if matrix.rule.masks_nothing else self.vector(matrix.cutoff, inputs)
        shift, start = self._shift(matrix.rule, inputs), None if matrix.start is None else matrix.start[half]
        more: tuple[int, ...] = ()
        scratch = 0
        if matrix.codes is None:
            address = self.hold(matrix.weight.detach()[half])
        else:
            laid, scratch = by_outputs(matrix.codes, half), cpu_codes.scratch_by_rows(inputs, parts)
            address, scales = self.hold_codes(laid)
            more = _of(laid, matrix, scales, half.start)
        self._wide = max(self._wide, inputs + rows + scratch)
        self._add(op, x, inputs, y, rows, address, cutoff, shift, self.vector(start, rows), parts, gate, limit, *more)

    def _low_rank(self, matrix: Matrix, x: int, cutoff: int, start: int) -> int:
        assert matrix.rule.low_rank is not None
        out, inputs = matrix.weight.shape
        u, v = (f.detach().to(matrix.weight).t().contiguous() for f in matrix.rule.low_rank)
        rank, base = u.shape[0], self.buffer(out)
        self._listed, self._wide = max(self._listed, inputs + 1), max(self._wide, rank)
        self.longest = max(self.longest, rank)
        self._add(ops.LOW_RANK, x, inputs, base, out, self.hold(u), cutoff, 0, start, rank, self.hold(v))
        return base

    def _shift(self, rule: Rule, inputs: int) -> int:
        moves = isinstance(rule.shift, Tensor) or rule.shift != 0.0
        return self.vector(torch.as_tensor(rule.shift).to(self.dtype).float().expand(inputs), inputs) if moves else 0

    def _parts(self, matrix: Matrix, half: slice = slice(None)) -> int:
        weight, codes = matrix.weight[half], matrix.codes
        share = 1.0 if codes is None else codes.format.bits_a_weight / PLAIN_BITS
        if self.threads == 1 or share * weight.numel() >= ALWAYS_PARALLEL:
            return self.threads
        if codes is None:
            return threads_for(weight, self.threads)
        return threads_for_codes(codes.format, *matrix.weight.shape, self.dtype, self.threads)

    def norm(self, norm: Norm, x: int, y: int, n: int, count: int = 1) -> None:
        """Adds an RMSNorm of each of `count` runs of `n` numbers."""
        gain = norm.weight.to(self.dtype).float() if norm.rounds_first else norm.offset + norm.weight.float()
        self._add(ops.NORM, x, n, y, count, self.vector(gain, n), int(norm.rounds_first), numbers=(norm.eps,))

    def turn(self, table: str, x: int, rotary: int, heads: int, size: int) -> None:
        """Adds the rotary embedding of heads, in place; where its table lies is said later."""
        self.turns.setdefault(table, []).append(len(self._rows))
        self._add(ops.TURN, x, rotary, 0, heads, 0, 0, size)

    def attend(
        self, x: int, y: int, heads: int, groups: int, size: int, window: int | None, numbers: tuple[float, float]
    ) -> None:
        """Adds grouped attention; where keys and values lie is said later. `numbers` are scaling and softcap."""
        self.attentions.append(len(self._rows))
        self._add(ops.ATTEND, x, heads, y, groups, 0, 0, size, 0, 0, window or 0, numbers=numbers)

    def open(self, activation: int, x: int, n: int) -> None:
        """Adds the activation of a gate, in place."""
        self._add(ops.OPEN, x, n, 0, activation)

    def mark(self, x: int, y: int, cutoff: Vector, n: int) -> None:
        """Writes to `y` a 1 where the magnitude at `x` is above `cutoff`, else a 0."""
        self._add(ops.MARK, x, n, y, 0, 0, self.vector(cutoff, n))

    def choose(self, x: int, y: int, head: Tensor, bias: Tensor, book: Tensor) -> None:
        """Writes to `y` the row of `book` [sets, neurons] for which ``head x + bias`` is largest."""
        (sets, inputs), neurons = head.shape, book.shape[1]
        self._wide, self.longest = max(self._wide, sets), max(self.longest, sets)
        held = [self.hold(t.detach().cpu().float().contiguous()) for t in (head, bias, book)]
        self._add(ops.CHOOSE, x, inputs, y, neurons, *held, 0, sets)

    def multiply(self, x: int, y: int, n: int) -> None:
        """Multiplies the numbers at `y` by those at `x`."""
        self._add(ops.MULTIPLY, x, n, y)

    def add(self, x: int, y: int, n: int, factor: float) -> None:
        """Adds the numbers at `x`, times a factor, to those at `y`."""
        self._add(ops.ADD, x, n, y, numbers=(factor,))

    def store(self, x: int, y: int, n: int) -> None:
        """Writes the numbers at `x` in the model's dtype."""
        self._add(ops.STORE, x, n, y)

    def _add(self, *entries: int, numbers: Sequence[float] = ()) -> None:
        self._rows.append([*entries, *[0] * (ops.ENTRIES - len(entries))])
        first, second = (*numbers, 0.0, 0.0)[:2]
        self._numbers.append((first, second))


def _of(laid: Laid, matrix: Matrix, scales: int, first: int = 0) -> tuple[int, ...]:
    """Gives what a row says of codes; `first` is the output that it begins with, and its group the first of `scales`.

    A run of outputs that begins inside a group skips those of the group that come before it.
    """
    assert matrix.codes is not None
    form, halves = matrix.codes.format, matrix.codes.scales.dtype == torch.float16
    before, skip = divmod(first, form.group)
    return form.bits, form.group, scales + before * laid.scales.strides[0], int(halves), laid.codes.strides[0], skip
