"""GPU products of quantised weights against products written from the codes: on a GPU, else interpreted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gpu_products import DEVICE, DTYPES, FEW, close, draw, kept_of
from host_kernels import COMPILER, host_function
from hypothesis import given
from hypothesis import strategies as st

from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding import cuda_quantised
from resting.sparsifier.decoding import cuda_quantised_layout as layout
from resting.sparsifier.decoding import cuda_quantised_triton as in_triton
from resting.sparsifier.decoding.cuda import quantised as by_tensor_cores
from resting.sparsifier.decoding.cuda.quantised import LAUNCHES, Launch
from resting.sparsifier.decoding.cuda_products import InputNorm
from resting.sparsifier.decoding.cuda_quantised import QuantisedColumns, QuantisedRows
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.nearest import quantised

NAMES = ["int4-g128", "int4-g32", "int4-g96", "int8", "int8-g32", "int8-g256"]
REASON = by_tensor_cores.missing(torch.device(DEVICE))
ON_HOST = DEVICE == "cpu" and COMPILER is not None
FORMS = [True, False] if REASON is None or ON_HOST else [True]
"""In Triton, and compiled: without a GPU by a C++ compiler, where no programs share a cluster."""
FOUR, TWO = (Launch(4, 1 if ON_HOST else 4, 2), Launch(2, 1 if ON_HOST else 2, 1))
needs_clusters = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@pytest.fixture(autouse=True)
def on_the_processor_without_a_gpu(monkeypatch):
    if ON_HOST:
        monkeypatch.setattr(cuda_quantised, "function", host_function)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that is not written to holds NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def weights(name, inputs, groups, seed, large=1.0):
    format = Format.parse(name)
    w = torch.randn(format.group * groups, inputs, generator=torch.Generator().manual_seed(seed)) * large
    return quantised(w.to(DEVICE), format)


def near(found, wanted, dtype, extra=1.0):
    """Near as numbers of the size that the sum of such products has."""
    unit = wanted.double().std().clamp(min=1e-30)
    return close(found.double() / unit, wanted.double() / unit, dtype, extra)


@FEW
@given(
    *(st.sampled_from(NAMES), st.integers(1, 90), st.integers(1, 4), st.sampled_from(DTYPES)),
    *(st.sampled_from(FORMS), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 10**6)),
)
def test_columns_are_the_formula(name, inputs, groups, dtype, triton, moves, biased, small, seed):
    weight = weights(name, inputs, groups, seed, 1e-5 if small else 1.0)
    x, shift = draw(seed, dtype, (inputs,), (inputs,))
    if moves:  # differences that no rounding touches: the interpreter cuts bfloat16 off where a GPU rounds
        x, shift = ((v * 8).round().clamp(-31, 31) / 8 for v in (x, shift))
    rule = Rule(threshold=torch.rand(inputs), scale=torch.rand(inputs) + 0.5, shift=shift.float() if moves else 0.0)
    bias = torch.rand(weight.outputs) if biased else None
    product = QuantisedColumns([weight], [rule], dtype, bias, None if triton else FOUR, triton=triton)
    found, _ = product.fused(x[None, None], keep_partial_sums=True)
    assert found.shape == (1, weight.outputs)
    wanted = kept_of(x, rule) @ weight.dequantised().double()
    wanted = wanted if bias is None else wanted + bias.to(DEVICE).double()
    assert ((found[0].double() - wanted).abs() <= 1e-5 * wanted.abs().max()).all()
    if DEVICE == "cuda":
        assert near(product(x[None, None])[0, 0], wanted, dtype)


@pytest.mark.parametrize("triton", FORMS)
@pytest.mark.parametrize("name", ["int4-g128", "int4-g32", "int8", "int8-g96"])
@pytest.mark.parametrize("counts", [(4, 2, 3), (1, 1, 1), (3, 11)])
def test_layers_of_one_input_share_a_launch_and_keep_their_masks(name, counts, triton):
    parts = [weights(name, 50, n, i, 1e-5 if i == 1 else 1.0) for i, n in enumerate(counts)]
    assert {part.scales.dtype for part in parts} == {torch.float16, torch.bfloat16}
    (x,) = draw(3, torch.bfloat16, (1, 1, 50))
    rules = [Rule(threshold=t, scale=torch.linspace(0.5, 1.5, 50)) for t in (0.3, 1.0, 0.0)][: len(counts)]
    product = QuantisedColumns(parts, rules, x.dtype, launch=TWO, triton=triton)
    found, _ = product.fused(x, keep_partial_sums=True)
    at = 0
    assert found.shape[1] == sum(part.outputs for part in parts)
    for part, rule in zip(parts, rules):
        wanted = kept_of(x[0, 0], rule) @ part.dequantised().double()
        assert near(found[0, at : at + part.outputs].float(), wanted, torch.float32, 64)
        at += part.outputs


@pytest.mark.parametrize("triton", FORMS)
@pytest.mark.parametrize("name", ["int4-g128", "int8-g32"])
def test_norm_gate_residual_and_low_rank_part(name, triton):
    weight = weights(name, 64, 3, 1)
    w = weight.dequantised().double()
    x, gain, residual, both = draw(1, torch.bfloat16, (1, 1, 64), (64,), (1, 1, weight.outputs), (1, 1, 128))
    make = {"launch": TWO, "triton": triton}
    rule = Rule(threshold=0.4)
    squares = x.float().square().sum()[None]
    product = QuantisedColumns([weight], [rule], x.dtype, **make)
    for rounds_first, of in ((True, gain), (False, gain.float())):
        found, _ = product.fused(x, InputNorm(squares, of, 1e-5, rounds_first), keep_partial_sums=True)
        v = x.float() * torch.rsqrt(squares / 64 + 1e-5)
        v = (v.to(x) * gain if rounds_first else (v * gain.float()).to(x))[0, 0]
        assert near(found[0], kept_of(v, rule) @ w, torch.bfloat16, 4.0)
    found, _ = QuantisedColumns([weight], [Rule()], x.dtype, **make).fused(both, gated=1, keep_partial_sums=True)
    gate, up = both[0, 0].chunk(2)
    v = torch.nn.functional.silu(gate.float()).to(x) * up
    assert near(found[0], v.double() @ w, torch.bfloat16, 8.0)  # the interpreter cuts off where a GPU rounds
    found, sums = product.fused(x, residual=residual, scale=0.5)
    wanted = 0.5 * (kept_of(x[0, 0], rule) @ w) + residual[0, 0].double()
    assert near(found[0, 0], wanted, torch.bfloat16, 4.0)
    assert abs(float(sums.double().sum() / found.double().square().sum()) - 1.0) < 1e-5
    u, v = draw(2, torch.bfloat16, (weight.outputs, 5), (5, 64))
    product = QuantisedColumns([weight], [Rule(threshold=0.4, low_rank=(u.cpu(), v.cpu()))], x.dtype, **make)
    found, _ = product.fused(x, keep_partial_sums=True)
    kept = kept_of(x[0, 0], rule)
    wanted = kept @ w + (x[0, 0].double() - kept) @ v.double().T @ u.double().T
    assert near(found[0], wanted, torch.bfloat16)


@pytest.mark.parametrize("triton", FORMS)
@pytest.mark.parametrize("name", NAMES)
def test_all_inputs_are_read_where_nothing_rests(name, triton):
    weight = weights(name, 77, 2, 4)
    (x,) = draw(4, torch.bfloat16, (1, 77))
    product = QuantisedColumns([weight], [Rule()], x.dtype, launch=TWO, reads_all=True, triton=triton)
    found, _ = product.fused(x, keep_partial_sums=True)
    assert near(found[0], x[0].double() @ weight.dequantised().double(), torch.float32, 64)
    assert torch.equal(product(x), product(x))


@FEW
@given(st.sampled_from(NAMES), st.integers(1, 300), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 10**6))
def test_rows_are_the_formula(name, inputs, dtype, biased, seed):
    weight = weights(name, inputs, 1, seed)
    x, gate = draw(seed, dtype, (inputs,), (weight.outputs,))
    bias = torch.randn(weight.outputs, generator=torch.Generator().manual_seed(seed)) if biased else None
    found = QuantisedRows(weight, 0.5, dtype, bias)(x[None, None], gate[None, None])[0, 0]
    up = x.double() @ weight.dequantised().double() + (0.0 if bias is None else bias.to(DEVICE).double())
    active = gate.double().abs() > 0.5
    assert not found[~active].any()
    bound = 2.0 * torch.finfo(dtype).eps  # up is rounded, and so is the product
    wanted = gate.double() * up
    room = bound * wanted.abs() + bound * gate.double().abs() * (1.0 + up.std())
    assert ((found.double() - wanted).abs() <= room)[active].all()


@pytest.mark.parametrize("name", NAMES)
def test_fragments_are_what_tensor_cores_are_given(name):
    """Takes words apart as ``quantised.cu`` does, lane by lane, and finds every code at its output."""
    weight = weights(name, 3, 2, 5)
    packed = layout.in_fragments(weight)
    bits, tile = packed.bits, packed.tile
    found = np.zeros((3, packed.codes.shape[1] // 32 * tile), dtype=np.int64)
    for row, words in enumerate(packed.codes.cpu().numpy().astype(np.int64) & 0xFFFFFFFF):
        for at, word in enumerate(words):
            first, thread, number = at // 32 * tile, at % 32 // 4, at % 4
            for place in range(4):
                turned = (word >> 4 * place | word << (32 - 4 * place)) & 0xFFFFFFFF
                for half in range(2):
                    held = turned >> (16 * half) >> 3 & 15
                    block, output = 2 * number + place % 2, thread * 4 + place // 2 * 2 + half
                    if bits == 4:
                        found[row, first + block * 32 + output] = held - 8
                    else:
                        found[row, first + number * 32 + output] += held * 16 - 128 if place % 2 else held
    assert np.array_equal(found[:, : weight.outputs], weight.codes.cpu().numpy())
    assert not found[:, weight.outputs :].any()
    scales = packed.scales.float().repeat_interleave(packed.unit, 1)[:, : weight.outputs]
    assert torch.equal(scales, weight.scales.float().repeat_interleave(weight.format.group, 1))


def test_what_kernels_do_not_take_is_refused():
    weight = weights("int4-g128", 48, 2, 6)
    product = QuantisedColumns([weight], [Rule(threshold=0.5)], torch.bfloat16, launch=TWO)
    (x,) = draw(6, torch.bfloat16, (2, 48))
    with pytest.raises(SparsifierError, match="one token of 48 inputs"):
        product(x)
    with pytest.raises(SparsifierError, match=r"in bfloat16, not \[1, 48\] in float16"):
        product(x[:1].half())
    for name, words in (
        ("int3-g128", "codes of 4 and 8 bits"),
        ("int4-g128-zero", "symmetric"),
        ("int4-g16", "not 16"),
    ):
        for make in (layout.in_fragments, layout.in_planes, layout.by_outputs):
            with pytest.raises(SparsifierError, match=words):
                make(weights(name, 48, 2, 6))
    with pytest.raises(SparsifierError, match="int4-g128, int8 share no launch"):
        QuantisedColumns([weight, weights("int8", 48, 2, 6)], [Rule(), Rule()], torch.bfloat16)
    with pytest.raises(SparsifierError, match="bfloat16 and float16, not float32"):
        QuantisedColumns([weight], [Rule()], torch.float32, triton=False)
    with pytest.raises(SparsifierError, match="weights of its own"):
        QuantisedColumns([weight], [Rule(weight=torch.zeros(256, 48))], torch.bfloat16)


@needs_clusters
@pytest.mark.parametrize(
    ("name", "launch", "inputs", "outputs"),
    [
        *((name, launch, 1000, 768) for name in ("int4-g128", "int8") for launch in LAUNCHES),
        *((name, LAUNCHES[1], 4096, 1024) for name in ("int4-g128", "int4-g32", "int8", "int8-g32")),
        *((name, LAUNCHES[0], 14336, 256) for name in ("int4-g128", "int4-g32", "int8", "int8-g32")),
    ],
)
def test_every_layout_gives_the_formula_and_the_same_bits(name, launch, inputs, outputs):
    weight = weights(name, inputs, outputs // Format.parse(name).group, 7)
    (x,) = draw(7, torch.bfloat16, (1, inputs))
    w = weight.dequantised().double()
    for rule, reads_all in ((Rule(threshold=0.7), False), (Rule(), True), (Rule(threshold=1e9), False)):
        product = QuantisedColumns([weight], [rule], x.dtype, torch.rand(outputs), launch, reads_all, triton=False)
        wanted = kept_of(x[0], rule) @ w + product._start.double()
        found, _ = product.fused(x, keep_partial_sums=True)
        assert ((found[0].double() - wanted).abs() <= 2e-5 * max(1.0, wanted.abs().max())).all()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            again = [product.fused(x, keep_partial_sums=True)[0] for _ in range(3)]
        graph.replay(), graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, found) for one in again)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("triton", FORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_outliers_and_what_is_not_a_number(triton, dtype):
    weight = weights("int8", 512, 2, 8)
    (x,) = draw(8, dtype, (1, 512))
    x[0, 5] = 30000.0
    product = QuantisedColumns([weight], [Rule(threshold=0.5)], dtype, launch=FOUR, triton=triton)
    found, _ = product.fused(x, keep_partial_sums=True)
    wanted = kept_of(x[0], Rule(threshold=0.5)) @ weight.dequantised().double()
    assert ((found[0].double() - wanted).abs() <= 1e-5 * wanted.abs().max()).all()
    x[0, 9] = float("nan")
    assert product(x).isnan().all()


def test_triton_s_counters_are_left_as_found():
    weight = weights("int8", 70, 2, 9)
    (x,) = draw(9, torch.bfloat16, (1, 70))
    product = QuantisedColumns([weight], [Rule(threshold=0.5)], x.dtype, launch=TWO, triton=True)
    assert in_triton.WORDS == layout.WORDS
    assert all(torch.equal(product(x), product(x)) for _ in range(2))
    assert not product._counter.any()
