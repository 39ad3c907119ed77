"""Products from codes on a CPU against float64 sums of the dequantised weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding.cpu_quantised_layout import apart, packed
from resting.sparsifier.decoding.cpu_quantised_products import CpuQuantised
from resting.sparsifier.decoding.products import quantised_columns
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.nearest import quantised
from resting.sparsifier.quantised.weight import QuantisedWeight

FORMATS = ["int8-g16", "int8-g64", "int8", "int4-g32", "int4-g64", "int4-g128"]


def drawn(*shape, seed=0, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def wanted(held, x, cutoff, shift=0.0, start=0.0, factors=None):
    """The masked product in float64; what is shifted is rounded to the dtype of x first."""
    moved = x if not isinstance(shift, torch.Tensor) else (x - shift.to(x.dtype)).to(x.dtype)
    keep = moved.float().abs() > torch.as_tensor(cutoff)
    kept = torch.where(keep, moved, torch.zeros((), dtype=x.dtype)).double()
    found = kept @ held.dequantised().double() + start
    if factors is not None:
        u, v = (f.to(x.dtype).double() for f in factors)
        found = found + (x.double() - kept) @ v.T @ u.T
    # Codes of 4 bits are summed with 8 added to each, which is taken off again.
    steps = held.scales.double().repeat_interleave(held.format.group, 1) * (8 if held.format.bits == 4 else 0)
    return found, kept.abs() @ (held.dequantised().double().abs() + steps)


def assert_near(found, reference, size, dtype):
    rounding = torch.finfo(dtype).eps * reference.abs() if dtype == torch.bfloat16 else 0.0
    assert ((found.double() - reference).abs() <= rounding + 3e-6 * size + 1e-30).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_products_are_those_of_the_dequantised_weights(name, dtype, threads):
    held = quantised(drawn(384, 70, scale=0.02), Format.parse(name))
    x = drawn(1, 1, 70, seed=1).to(dtype)
    for cutoff in (-1.0, 0.0, 0.3, 0.7, 2.0, 9.0):
        product = CpuQuantised(held, dtype, cutoff, threads=threads)
        assert_near(product(x), *wanted(held, x, cutoff), dtype)


@settings(max_examples=25, deadline=None)
@given(inputs=st.integers(1, 40), groups=st.integers(1, 5), seed=st.integers(0, 99), bits=st.sampled_from([4, 8]))
def test_any_number_of_inputs_and_groups(inputs, groups, seed, bits):
    held = quantised(drawn(32 * groups, inputs, seed=seed), Format(bits, 32))
    x = drawn(1, inputs, seed=seed + 1)
    cutoff = drawn(inputs, seed=seed + 2).abs()
    assert_near(CpuQuantised(held, torch.float32, cutoff)(x), *wanted(held, x, cutoff), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["int8", "int4-g32"])
def test_bias_shift_and_low_rank_parts(name, dtype):
    held = quantised(drawn(256, 48, scale=0.05), Format.parse(name))
    x, bias, shift = drawn(1, 48, seed=1).to(dtype), drawn(256, seed=2), drawn(48, seed=3, scale=0.3)
    found = quantised_columns(held, Rule(threshold=0.5, shift=shift), dtype, bias)(x)
    cutoff = Rule(threshold=0.5).cutoff(dtype)
    assert_near(found, *wanted(held, x, cutoff, shift.to(dtype), bias.double()), dtype)
    factors = drawn(256, 4, seed=4, scale=0.1), drawn(4, 48, seed=5, scale=0.1)
    found = quantised_columns(held, Rule(threshold=0.5, low_rank=factors), dtype, bias)(x)
    reference, size = wanted(held, x, cutoff, 0.0, bias.double(), factors)
    assert_near(found, reference, size + 1.0, dtype)


def test_a_resting_row_is_not_read():
    """What is at rest may hold anything: with scales that are infinite, the product would be too."""
    held = quantised(drawn(128, 20), Format.parse("int8"))
    product = CpuQuantised(held, torch.float32, 0.5)
    x = drawn(1, 20, seed=1)
    before = product(x).clone()
    for row in np.flatnonzero(x[0].abs().numpy() <= 0.5):
        product._scales[row] = 0x7BFF
    assert torch.equal(product(x), before)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scales_in_bfloat16(scale):
    held = quantised(drawn(128, 20, scale=scale), Format.parse("int4-g64"))
    assert held.scales.dtype == torch.bfloat16
    x = drawn(1, 20, seed=1)
    assert_near(CpuQuantised(held, torch.float32, -1.0)(x), *wanted(held, x, -1.0), torch.float32)


def test_nan_and_infinity_pass():
    held = quantised(drawn(128, 20), Format.parse("int8"))
    for value in (float("nan"), float("inf")):
        x = drawn(1, 20, seed=1)
        x[0, 3] = value
        assert not torch.isfinite(CpuQuantised(held, torch.float32, 0.5)(x)).any()


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 5), groups=st.integers(1, 4), half=st.integers(1, 9), seed=st.integers(0, 99))
def test_packed_codes_come_out_again(rows, groups, half, seed):
    codes = torch.randint(-8, 8, (rows, groups * 2 * half), generator=torch.Generator().manual_seed(seed)).to(
        torch.int8
    )
    both = packed(codes, 2 * half).reshape(rows, groups, half).astype(np.int16)
    out = np.concatenate([(both & 15) - 8, (both >> 4) - 8], axis=-1)
    assert np.array_equal(out.reshape(rows, -1), codes.numpy())


@pytest.mark.parametrize("width", [1, 63, 64, 65, 128, 4096])
def test_rows_begin_an_odd_number_of_lines_apart(width):
    rows = np.arange(3 * width, dtype=np.uint8).reshape(3, width)
    wide = apart(rows)
    assert wide.shape[1] % 128 == 64
    assert np.array_equal(wide[:, :width], rows)


@pytest.mark.parametrize("form", [Format(3, 32), Format(8, 8), Format(4, 16), Format(4, 32, True)])
def test_formats_without_a_kernel_are_refused(form):
    held = quantised(drawn(64, 8), form)
    with pytest.raises(SparsifierError, match=f"there is no CPU kernel for {form.name}; allowed: symmetric codes"):
        quantised_columns(held, Rule(threshold=0.1), torch.float32)


def test_rules_without_a_kernel_are_refused():
    held = quantised(drawn(64, 8), Format.parse("int8-g32"))
    with pytest.raises(SparsifierError, match="a rule with weights of its own has no product"):
        quantised_columns(held, Rule(weight=torch.zeros(64, 8)), torch.float32)
    with pytest.raises(SparsifierError, match="a rule with topk has none"):
        quantised_columns(held, Rule(topk=3), torch.float32)
    with pytest.raises(SparsifierError, match="decode kernels on cpu take float32, bfloat16, not float16"):
        quantised_columns(held, Rule(), torch.float16)
    zero = QuantisedWeight(held.format, held.codes, torch.zeros_like(held.scales))
    with pytest.raises(SparsifierError, match="scales of float16 are to be positive and normal"):
        quantised_columns(zero, Rule(), torch.float32)
