"""Decode kernels for GPUs against products written from the formula: on a GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch
from gpu_products import DEVICE, DTYPES, FEW, FORMS, LAUNCHES, Operators, close, draw, kept_of
from hypothesis import given
from hypothesis import strategies as st

from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding import cuda_layouts
from resting.sparsifier.decoding.contract import check, input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns, CudaRows
from resting.sparsifier.decoding.products import columns, rows


@FEW
@given(
    *(st.integers(1, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(FORMS)),
    *(st.booleans(), st.booleans(), st.integers(0, 10**6)),
)
def test_columns_are_the_formula(inputs, outputs, dtype, launch, moves, biased, seed):
    w, x, shift = draw(seed, dtype, (outputs, inputs), (inputs,), (inputs,))
    threshold, scale, bias = (torch.rand(n) for n in (inputs, inputs, outputs))
    if moves:  # differences that no rounding touches: the interpreter cuts bfloat16 off where a GPU rounds
        x, shift = ((v * 8).round().clamp(-31, 31) / 8 for v in (x, shift))
    rule = Rule(threshold=threshold, scale=scale + 0.5, shift=shift.float() if moves else 0.0)
    product = CudaColumns(input_major(w), [(outputs, rule)], bias if biased else None, launch)
    found = product(x[None, None])
    assert found.shape == (1, 1, outputs)
    assert found.dtype == dtype
    wanted = kept_of(x, rule) @ w.double().T + (bias.to(DEVICE).double() if biased else 0.0)
    assert close(found[0, 0], wanted, dtype)
    assert not product._counter.any()  # as found: the next call counts from zero


@FEW
@given(st.integers(1, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.booleans(), st.integers(0, 10**6))
def test_rows_are_the_formula(inputs, outputs, dtype, biased, seed):
    w, x, gate = draw(seed, dtype, (outputs, inputs), (inputs,), (outputs,))
    bias = torch.randn(outputs, generator=torch.Generator().manual_seed(seed))
    found = CudaRows(w, 0.5, bias if biased else None)(x[None, None], gate[None, None])[0, 0]
    up = x.double() @ w.double().T + (bias.to(DEVICE).double() if biased else 0.0)
    active = gate.double().abs() > 0.5
    assert not found[~active].any()
    bound = 2.0 * torch.finfo(dtype).eps  # up is rounded, and so is the product
    wanted = gate.double() * up
    assert ((found.double() - wanted).abs() <= bound * wanted.abs() + bound * gate.double().abs())[active].all()


@FEW
@given(
    *(st.integers(1, 90), st.integers(1, 60), st.integers(1, 70), st.sampled_from(DTYPES)),
    *(st.sampled_from(FORMS), st.integers(0, 10**6)),
)
def test_a_low_rank_part_is_the_formula(inputs, outputs, rank, dtype, launch, seed):
    w, u, v, x = draw(seed, dtype, (outputs, inputs), (outputs, rank), (rank, inputs), (inputs,))
    rule = Rule(threshold=0.6, low_rank=(u.cpu(), v.cpu()))
    kept = kept_of(x, rule)
    wanted = kept @ w.double().T + (x.double() - kept) @ v.double().T @ u.double().T
    found = CudaColumns(input_major(w), [(outputs, rule)], launch=launch)(x)
    assert close(found.double() / wanted.abs().max(), wanted / wanted.abs().max(), dtype, 2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_of_one_input_share_a_launch_and_keep_their_masks(dtype):
    widths = (32, 16, 21)
    *weights, x = draw(3, dtype, *((n, 50) for n in widths), (1, 1, 50))
    rules = [Rule(threshold=t, scale=torch.linspace(0.5, 1.5, 50)) for t in (0.3, 1.0, 0.0)]
    together = CudaColumns(
        input_major(torch.cat(weights)), list(zip(widths, rules)), launch=LAUNCHES[1]._replace(outputs=16)
    )
    apart = [kept_of(x[0, 0], rule) @ w.double().T for w, rule in zip(weights, rules)]
    assert close(together(x)[0, 0], torch.cat(apart), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layers_that_share_a_launch_have_low_rank_parts_of_their_own(dtype):
    widths, ranks = (32, 16, 21), (5, 0, 70)
    *weights, x = draw(6, dtype, *((n, 50) for n in widths), (1, 1, 50))
    factors = [tuple(draw(n, dtype, (n, rank), (rank, 50))) if rank else None for n, rank in zip(widths, ranks)]
    rules = [Rule(threshold=t, low_rank=f) for t, f in zip((0.3, 1.0, 0.6), factors)]
    launch = LAUNCHES[1]._replace(outputs=16)
    together = CudaColumns(input_major(torch.cat(weights)), list(zip(widths, rules)), launch=launch)
    apart = []
    for w, rule, parts in zip(weights, rules, factors):
        kept = kept_of(x[0, 0], rule)
        rest = 0.0 if parts is None else (x[0, 0].double() - kept) @ parts[1].double().T @ parts[0].double().T
        apart.append(kept @ w.double().T + rest)
    wanted = torch.cat(apart)
    assert close(together(x)[0, 0].double() / wanted.abs().max(), wanted / wanted.abs().max(), dtype, 2.0)


@pytest.mark.parametrize("launch", [at for at in FORMS if not getattr(at, "atomic", False)])
def test_a_sum_does_not_depend_on_who_finishes_first(launch):
    w, x = draw(0, torch.bfloat16, (80, 300), (1, 300))
    product = CudaColumns(input_major(w), [(80, Rule(threshold=0.5))], launch=launch)
    assert all(torch.equal(product(x), product(x)) for _ in range(2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_passes_as_through_a_dense_layer(value):
    w, x = (
        torch.ones(8, 16, dtype=torch.bfloat16, device=DEVICE),
        torch.zeros(1, 16, dtype=torch.bfloat16, device=DEVICE),
    )
    x[..., 3] = value
    found = CudaColumns(input_major(w), [(8, Rule(threshold=1.0))], launch=LAUNCHES[1])(x)
    assert torch.equal(found.isnan(), torch.full_like(found, value != value).bool())
    assert bool((found == value).all()) or value != value


def test_operators_are_registered_as_torch_asks():
    w, x, u, v = draw(1, torch.bfloat16, (32, 48), (1, 48), (32, 5), (5, 48))
    product = CudaColumns(input_major(w), [(32, Rule(threshold=0.5, low_rank=(u, v)))], torch.randn(32))
    up = CudaRows(w, 0.5)
    with Operators() as operators:
        product(x)
        up(x, torch.randn(1, 32, device=DEVICE).bfloat16())
    operators.check(3)


def test_torch_compile_takes_a_product_whole():
    w, x = draw(2, torch.bfloat16, (32, 48), (1, 1, 48))
    product = CudaColumns(input_major(w), [(32, Rule(threshold=0.5))])
    compiled = torch.compile(lambda x: product(x) * 2, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), product(x) * 2)


def test_what_kernels_do_not_take_is_refused():
    w, x = draw(4, torch.bfloat16, (32, 48), (2, 48))
    product = CudaColumns(input_major(w), [(32, Rule(threshold=0.5))])
    with pytest.raises(SparsifierError, match="one token of 48 inputs, not \\[2, 48\\]"):
        product(x)
    with pytest.raises(SparsifierError, match="one token of 48 inputs"):
        CudaRows(w, 0.5)(x, x)
    with pytest.raises(SparsifierError, match="on cuda take bfloat16, float16, not float32"):
        check(torch.float32, torch.device("cuda"))
    with pytest.raises(SparsifierError, match="share"):
        CudaColumns(input_major(w), [(15, Rule()), (17, Rule())])


@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 14336), (14336, 4096), (4096, 1024), (576, 256), (64, 128256)])
def test_layouts_for_trial_fit_the_shape(inputs, outputs):
    found = cuda_layouts.candidates(inputs, outputs, 132, (outputs // 2,))
    assert 1 <= len(found) <= 77
    for at in found:
        assert outputs // 2 % at.outputs == 0
        assert 1 <= at.split <= 32
        assert at.split == 1 or inputs >= at.inputs * at.split


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inputs", "outputs"), [(4096, 14336), (14336, 4096), (4096, 1024), (2048, 2048), (1000, 777)])
def test_on_the_device_at_the_layout_that_is_chosen(inputs, outputs, dtype):
    w, x, gate = draw(5, dtype, (outputs, inputs), (1, inputs), (1, outputs))
    bias = torch.randn(outputs)
    for rule in (Rule(threshold=0.7), Rule(threshold=torch.rand(inputs)), Rule()):
        product = columns(input_major(w), rule, bias)
        wanted = kept_of(x[0], rule) @ w.double().T + bias.to(DEVICE)
        assert close(product(x)[0].double() / wanted.std(), wanted / wanted.std(), dtype, 2.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = product(x)
        graph.replay(), graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, product(x))
    found = rows(w, Rule(threshold=0.7))(x, gate)[0]
    wanted = torch.where(gate.double().abs() > 0.7, gate.double() * (x.double() @ w.double().T), 0.0)[0]
    assert close(found.double() / wanted.std(), wanted / wanted.std(), dtype, 4.0)
