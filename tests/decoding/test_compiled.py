"""What compiled kernels rest on, without a GPU: sums in fixed point, packed arguments, the compiler and the reasons."""

from __future__ import annotations

import ctypes
import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda import compiled, nvrtc
from resting.sparsifier.decoding.cuda.arguments import ProductArguments, StreamArguments
from resting.sparsifier.decoding.cuda.driver import LaunchAttribute, LaunchConfig
from resting.sparsifier.decoding.cuda.products import check_shapes
from resting.sparsifier.decoding.cuda.sums import Sums, steps_for
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.decoding.cuda.typical import typical_sum
from resting.sparsifier.decoding.cuda.variant import Tile, Variant

CPU = torch.device("cpu")


def test_arguments_lie_as_a_compiler_lays_them():
    assert ctypes.sizeof(ProductArguments) == struct.calcsize("14P6f9i2i2ii0P")
    assert ProductArguments.eps.offset == 14 * 8
    assert ProductArguments.inputs.offset == 14 * 8 + 6 * 4
    assert ProductArguments.tiles.offset == 14 * 8 + 6 * 4 + 9 * 4 + 8
    assert ctypes.sizeof(StreamArguments) == struct.calcsize("3P3f2i0P")


def test_launches_are_described_as_the_driver_has_it():
    """The sizes and places of ``CUlaunchConfig`` and ``CUlaunchAttribute`` in cuda.h, on 64 bits."""
    assert (LaunchConfig.stream.offset, LaunchConfig.attributes.offset, LaunchConfig.count.offset) == (32, 40, 48)
    assert (ctypes.sizeof(LaunchConfig), ctypes.sizeof(LaunchAttribute), LaunchAttribute.value.offset) == (56, 72, 8)


def added(sums, column, value):
    """Adds a part as the kernel does: to the low word, or to both."""
    steps = round(value * sums.steps)
    low, high = sums.words[: 2 * sums.width].view(2, -1)
    if abs(value * sums.steps) < sums.limit:
        parts = ((low, steps),)
    else:
        parts = (low, steps & 0xFFFF), (high, steps >> 16)
        bit = 1 << column % 32
        sums.words[2 * sums.width + column // 32] |= bit if bit < 1 << 31 else -bit
    for word, part in parts:
        total = int(word[column]) + part
        assert -(1 << 31) <= total < 1 << 31
        word[column] = total


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=200), st.integers(0, 39), st.integers(4, 20))
def test_no_word_wraps_and_no_order_changes_a_sum(parts, column, exponent):
    found = []
    for order in (parts, parts[::-1], sorted(parts)):
        sums = Sums(40, 2.0**exponent, CPU)
        sums.register(len(parts))
        for part in order:
            added(sums, column, part)
        found.append(float(sums.values[column]))
        assert not sums.values[torch.arange(40) != column].any()
    assert found[0] == found[1] == found[2]
    assert abs(found[0] - math.fsum(parts)) <= len(parts) * 0.5 / 2.0**exponent


def test_sums_say_what_they_do_not_take():
    with pytest.raises(SparsifierError, match="power of two as their scale, not 3"):
        Sums(8, 3.0, CPU)
    with pytest.raises(SparsifierError, match="take 32,768 parts, not 40,000"):
        Sums(8, 1.0, CPU).register(40_000)


@given(st.floats(1e-6, 1e6), st.integers(1, 30_000))
def test_a_scale_keeps_usual_parts_in_one_word(typical, parts):
    steps = steps_for(typical, parts)
    assert math.frexp(steps)[0] == 0.5
    assert (1 << 31) / parts / 4 < 2.0 * typical * steps <= (1 << 31) / parts * (1 + 1e-9)


def test_typical_sums_are_those_of_normed_inputs():
    torch.manual_seed(0)
    w, gain = torch.randn(300, 200) * torch.linspace(0.1, 1.0, 300)[:, None], torch.rand(200)
    x = torch.randn(5000, 200)
    rms = ((x * gain) @ w.T).square().mean().sqrt()
    assert typical_sum(w, [Rule()], Input(gain=gain)) == pytest.approx(float(rms), rel=0.05)
    assert typical_sum(w, [Rule(threshold=0.25)], Input()) == pytest.approx(
        0.25 * float(w.square().sum(1).mean().sqrt())
    )


@pytest.mark.parametrize(
    ("outputs", "inputs", "widths", "gain", "reason"),
    [
        (20, 16, [20], None, "multiples of 8, not 20"),
        (80, 16, [40, 40], None, "multiples of 32 outputs, not \\[40, 40\\]"),
        (32, 24, [32], torch.ones(24), "multiples of 16 inputs, not of 24"),
        (128, 16, [32] * 4, None, "one to three layers"),
    ],
)
def test_shapes_that_the_kernel_does_not_take_have_a_reason(outputs, inputs, widths, gain, reason):
    with pytest.raises(SparsifierError, match=reason):
        check_shapes(input_major(torch.zeros(outputs, inputs, dtype=torch.bfloat16)), widths, Input(gain=gain))


def test_there_is_a_reason_where_there_are_no_compiled_kernels(monkeypatch):
    assert "NVIDIA" in compiled.missing(CPU)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(compiled.torch.version, "hip", None)
    monkeypatch.setattr(compiled.torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "8.0 or later, and this GPU has 7.5" in compiled.missing.__wrapped__(gpu)
    monkeypatch.setattr(compiled.torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(compiled.driver, "can_launch", lambda: False)
    assert "11.8" in compiled.missing.__wrapped__(gpu)
    monkeypatch.setattr(compiled.driver, "can_launch", lambda: True)
    monkeypatch.setattr(compiled.nvrtc, "found", lambda: None)
    assert "NVRTC" in compiled.missing.__wrapped__(gpu)


def test_a_tile_covers_its_inputs():
    assert Tile(8, 16, 8).programs(4096) == 32
    assert Tile(8, 16, 8).programs(4097) == 33


@pytest.mark.skipif(nvrtc.found() is None, reason="needs NVRTC")
def test_the_compiler_makes_machine_code_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path))
    size = ctypes.sizeof(ProductArguments)
    made = compiled.cubin(Variant("columns", size), "sm_90")
    assert made[:4] == b"\x7fELF"
    monkeypatch.setattr(nvrtc.Nvrtc, "cubin", None)
    assert compiled.cubin(Variant("columns", size), "sm_90") == made
    monkeypatch.undo()
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path))
    with pytest.raises(SparsifierError, match="the arguments are packed otherwise"):
        compiled.cubin(Variant("columns", size + 8), "sm_90")
