"""Compiled products of codes that vote, against the formula in double precision; without a GPU on the processor."""

from __future__ import annotations

import pytest
import torch
from gpu_products import DTYPES, draw
from host_kernels import COMPILER, host_function
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from voting import near, normed, opened, poison, product_of

from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding.cuda import products
from resting.sparsifier.decoding.cuda import stream as stream_module
from resting.sparsifier.decoding.cuda.codes import LANE_BYTES, side_by_side
from resting.sparsifier.decoding.cuda.compiled import missing
from resting.sparsifier.decoding.cuda.products import VotingColumns
from resting.sparsifier.decoding.cuda.stream import Stream
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.decoding.cuda.variant import Tile
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.nearest import quantised

ON_GPU = torch.cuda.is_available()
HERE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(not ON_GPU and COMPILER is None, reason="needs a GPU, or a C++ compiler"),
    pytest.mark.skipif(ON_GPU and missing(HERE) is not None, reason="needs compiled kernels"),
]
FORMS = [
    ("int8", 8),
    ("int8", 16),
    ("int8-g32", 8),
    ("int4-g128", 4),
    ("int4-g128", 8),
    ("int4-g128", 16),
    ("int4-g32", 4),
]
FORMS += [("int4-g96", 8), ("int8-g256", 16)]
"""Formats, and bytes that a lane reads at once."""
TILES = [Tile(4, 16, 8), Tile(8, 8, 8), Tile(4, 32, 8), Tile(2, 16, 16)]
if not ON_GPU:
    TILES = [Tile(2, 16, 8), Tile(2, 32, 4)]
assert {bits for bits, _ in ((Format.parse(name).bits, 0) for name, _ in FORMS)} == set(LANE_BYTES)


@pytest.fixture(autouse=True)
def without_a_gpu_on_the_processor(monkeypatch):
    if not ON_GPU:
        for module in (products, stream_module):
            monkeypatch.setattr(module, "function", host_function)


def weights(name, inputs, groups, seed, large=0.05):
    format = Format.parse(name)
    w = torch.randn(format.group * groups, inputs, generator=torch.Generator().manual_seed(seed)) * large
    return quantised(w.to(HERE), format)


def matrix(*parts):
    """The weights [out, in] that codes stand for."""
    return torch.cat([part.dequantised().double().T for part in parts])


@settings(deadline=None, max_examples=40 if ON_GPU else 4, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    *(st.sampled_from(FORMS), st.sampled_from(TILES), st.integers(1, 300 if ON_GPU else 70), st.integers(1, 4)),
    *(st.sampled_from(DTYPES), st.booleans(), st.booleans(), st.integers(0, 10**6)),
)
def test_columns_are_the_formula(form, tile, inputs, groups, dtype, biased, small, seed):
    name, lane_bytes = form
    weight = weights(name, inputs, groups, seed, 1e-5 if small else 0.05)
    x, shift = draw(seed, dtype, (inputs,), (inputs,))
    bias = torch.rand(weight.outputs) if biased else None
    codes = side_by_side([weight], dtype, lane_bytes)
    for rule, every in (
        (Rule(threshold=torch.rand(inputs), scale=torch.rand(inputs) + 0.5), False),
        (Rule(threshold=0.7, shift=shift.float()), False),
        (Rule(), True),
        (Rule(threshold=50.0), False),
    ):
        product = VotingColumns(codes, [(weight.outputs, rule)], bias, tile=tile, reads_all=every)
        if ON_GPU:
            poison(HERE)
        found, again = product(x), product(x)
        wanted = product_of(x, matrix(weight), [(weight.outputs, rule)], bias)
        assert torch.equal(found, again)
        room = torch.finfo(dtype).eps * wanted.abs() + 2e-5 * wanted.abs().max()
        assert ((found.double() - wanted).abs() <= room + torch.finfo(dtype).smallest_normal).all(), rule
        assert not product.sums.words.any()


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_float32(form, every):
    name, lane_bytes = form
    weight = weights(name, 75, 2, 11)
    (x,) = draw(5, torch.bfloat16, (75,))
    layers = [(weight.outputs, Rule() if every else Rule(threshold=0.6))]
    codes = side_by_side([weight], x.dtype, lane_bytes)
    place = Sums(weight.outputs, 1.0, HERE)
    product = VotingColumns(codes, layers, place=place, tile=TILES[0], reads_all=every)
    product(x)
    wanted = product_of(x, matrix(weight), layers)
    assert (product.sums.values - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_layers_share_a_launch_and_keep_their_masks(form):
    name, lane_bytes = form
    group = Format.parse(name).group
    parts = [weights(name, 50, n, i, 1e-5 if i == 1 else 1.0) for i, n in enumerate((4, 1, 3))]
    assert {part.scales.dtype for part in parts} == {torch.float16, torch.bfloat16}
    (x,) = draw(3, torch.bfloat16, (50,))
    layers = [(n * group, Rule(threshold=t)) for n, t in zip((4, 1, 3), (0.3, 1.0, 0.0))]
    product = VotingColumns(side_by_side(parts, x.dtype, lane_bytes), layers, tile=TILES[0])
    found, wanted, at = product(x), product_of(x, matrix(*parts), layers), 0
    for i, (n, _) in enumerate(layers):
        part = slice(at, at + n)
        if i != 1:  # sums share their steps: the small layer's are as fine as those of the large ones
            assert near(found[part], wanted[part], 2.0 * torch.finfo(x.dtype).eps)
        at += n


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS[::2])
def test_a_norm_a_gate_and_a_stream(form, dtype):
    name, lane_bytes = form
    inputs, eps = 272, 16.0 * torch.finfo(dtype).eps
    weight = weights(name, inputs, 2, 3)
    codes, w, layers = side_by_side([weight], dtype, lane_bytes), matrix(weight), [(weight.outputs, Rule())]
    x, gain, gate, up, before = draw(2, dtype, (inputs,), (inputs,), (inputs,), (inputs,), (weight.outputs,))
    stream = Stream(inputs, 1.0, dtype, HERE)
    stream.begin(x)
    taken = Input(stream.sums, gain, 1e-5)
    found = VotingColumns(codes, layers, taken=taken, reads_all=True, tile=TILES[0])()
    assert near(found, product_of(normed(x, gain, 1e-5, True, dtype), w, layers), eps)
    both = Stream(2 * inputs, 1.0, dtype, HERE)
    both.begin(torch.cat([gate, up]))
    out, other = Stream(weight.outputs, 1.0, dtype, HERE), Sums(1000, 1.0, HERE)
    other.words.fill_(7)
    out.begin(before)
    rule = Rule(threshold=0.2)
    layers = [(weight.outputs, rule)]
    VotingColumns(
        codes, layers, taken=Input(both.sums, gated=1), into=out.sums, scale=0.5, zeros=other, tile=TILES[1]
    )()
    wanted = before.double() + 0.5 * product_of(opened(gate, up, 1, dtype), w, layers)
    assert near(out.sums.values, wanted, eps)
    assert not other.words.any()


@pytest.mark.parametrize("form", [form for form in FORMS if form[1] * 8 // Format.parse(form[0]).bits == 8])
def test_low_rank_parts_of_narrow_programs(form):
    name, lane_bytes = form
    weight = weights(name, 90, 3, 1)
    u, v, x = draw(2, torch.bfloat16, (weight.outputs, 5), (5, 90), (90,))
    layers = [(weight.outputs, Rule(threshold=0.4, low_rank=(u.cpu() * 0.1, v.cpu() * 0.1)))]
    found = VotingColumns(side_by_side([weight], x.dtype, lane_bytes), layers, tile=TILES[0])(x)
    assert near(found, product_of(x, matrix(weight), layers), 4.0 * torch.finfo(x.dtype).eps)


def test_nan_does_not_get_lost():
    weight = weights("int4-g128", 64, 4, 0)
    x = torch.ones(64, dtype=torch.bfloat16, device=HERE)
    layers = [(weight.outputs, Rule(threshold=0.5))]
    product = VotingColumns(side_by_side([weight], x.dtype, 8), layers, tile=TILES[0])
    good = product(x)
    x[3] = float("nan")
    assert product(x).isnan().all()
    x[3] = 1.0
    assert torch.equal(product(x), good)


def test_what_the_kernel_does_not_take_is_refused():
    weight = weights("int8", 64, 4, 0)
    with pytest.raises(SparsifierError, match="float32"):
        side_by_side([weight], torch.float32, 8)
    with pytest.raises(SparsifierError, match=r"\(8, 16\) bytes .* not 4"):
        side_by_side([weight], torch.bfloat16, 4)
    with pytest.raises(SparsifierError, match="one format"):
        side_by_side([weight, weights("int8-g32", 64, 4, 0)], torch.bfloat16, 8)
    codes = side_by_side([weight], torch.bfloat16, 16)
    with pytest.raises(SparsifierError, match="does not fit the layout"):
        VotingColumns(codes, [(weight.outputs, Rule())], tile=Tile(32, 32, 8))
    rule = Rule(threshold=0.4, low_rank=(torch.ones(weight.outputs, 2), torch.ones(2, 64)))
    with pytest.raises(SparsifierError, match="256 outputs a program, not 512"):
        VotingColumns(codes, [(weight.outputs, rule)], tile=Tile(4, 16, 8))
