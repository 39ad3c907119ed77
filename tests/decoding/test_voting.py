"""Compiled kernels against the formula in double precision: all inputs, sums, dtypes and ragged shapes.

Without a GPU the same source runs on the processor, its threads taking turns, and smaller.
"""

from __future__ import annotations

import pytest
import torch
from gpu_products import DTYPES, draw
from host_kernels import COMPILER, host_function
from voting import ACTIVATED, near, normed, opened, poison, product_of

from resting.sparsifier import Rule
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda import products, rows
from resting.sparsifier.decoding.cuda import stream as stream_module
from resting.sparsifier.decoding.cuda.compiled import missing
from resting.sparsifier.decoding.cuda.products import VotingColumns
from resting.sparsifier.decoding.cuda.rows import VotingRows
from resting.sparsifier.decoding.cuda.stream import Stream
from resting.sparsifier.decoding.cuda.sums import Sums
from resting.sparsifier.decoding.cuda.taking import Input
from resting.sparsifier.decoding.cuda.variant import Tile

ON_GPU = torch.cuda.is_available()
HERE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(not ON_GPU and COMPILER is None, reason="needs a GPU, or a C++ compiler"),
    pytest.mark.skipif(ON_GPU and missing(HERE) is not None, reason="needs compiled kernels"),
]
TILES = [Tile(4, 16, 8), Tile(8, 8, 8), Tile(8, 32, 8), Tile(16, 16, 8)]
SHAPES = [(256, 512), (1000, 264), (96, 8), (16, 1032), (4096, 4096)]
"""Inputs and outputs."""
WIDTHS = [256, 1008, 4096]
if not ON_GPU:
    TILES, SHAPES, WIDTHS = [Tile(2, 16, 8), Tile(2, 32, 4), Tile(4, 8, 8)], [(100, 264), (40, 8), (16, 288)], [272]


@pytest.fixture(autouse=True)
def without_a_gpu_on_the_processor(monkeypatch):
    if not ON_GPU:
        for module in (products, rows, stream_module):
            monkeypatch.setattr(module, "function", host_function)


def flips(dtype):
    """What a few inputs may bring that were rounded the other way."""
    return 16.0 * torch.finfo(dtype).eps


def filled(values, dtype, steps=2.0**16):
    """Sums that hold numbers, as a stream does."""
    stream = Stream(len(values), 2.0**13 / steps, dtype, HERE)
    stream.begin(values.to(dtype))
    return stream.sums


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_columns_are_the_formula(inputs, outputs, tile, dtype):
    w, x = draw(inputs + outputs, dtype, (outputs, inputs), (inputs,))
    bias = torch.randn(outputs)
    shift = torch.randn(inputs).mul(0.3).to(dtype).float()
    for rule, start, every, floats in (
        (Rule(threshold=0.7), None, False, False),
        (Rule(threshold=torch.rand(inputs), scale=torch.rand(inputs) + 0.5), bias, False, False),
        (Rule(threshold=0.7, shift=shift), None, False, False),
        (Rule(), None, True, False),
        (Rule(threshold=0.7), bias, False, True),
    ):
        product = VotingColumns(input_major(w), [(outputs, rule)], start, reads_all=every, tile=tile, float_sums=floats)
        poison(HERE)
        found, again = product(x), product(x)
        wanted = product_of(x, w, [(outputs, rule)], start)
        assert near(found, wanted, 1e-5 * inputs**0.5), rule
        assert floats or torch.equal(found, again)
        assert not product.sums.words.any()
        assert not product._counter.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds_first", [True, False])
@pytest.mark.parametrize("inputs", WIDTHS)
def test_a_norm_reads_sums_and_numbers(inputs, rounds_first, dtype):
    w, x, gain = draw(inputs, dtype, (520, inputs), (inputs,), (inputs,))
    x = x * 0.1
    gain = (1.0 + 0.2 * gain.float()).to(dtype if rounds_first else torch.float32)
    rule = Rule(threshold=0.5)
    wanted = product_of(normed(x, gain, 1e-5, rounds_first, dtype), w, [(520, rule)])
    for sums in (None, filled(x, dtype)):
        taken = Input(sums, gain, 1e-5, rounds_first)
        found = VotingColumns(input_major(w), [(520, rule)], taken=taken)(x if sums is None else None)
        # a number beside the threshold may fall on the other side of it: few do
        assert (found - wanted).norm() <= 0.02 * wanted.norm()
        exact = product_of(normed(x, gain, 1e-5, rounds_first, dtype), w, [(520, Rule())])
        every = VotingColumns(input_major(w), [(520, Rule())], taken=taken, reads_all=True)(x if sums is None else None)
        assert near(every, exact, flips(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [1, 2, 3])
def test_a_gate_opens_what_is_read(activation, dtype):
    w, gate, up = draw(activation, dtype, (264, 1000), (1000,), (1000,))
    both = torch.cat([gate, up])
    v = opened(gate, up, activation, dtype)
    for sums in (None, filled(both, dtype)):
        taken = Input(sums, gated=activation)
        product = VotingColumns(input_major(w), [(264, Rule())], taken=taken, reads_all=True)
        found = product(both if sums is None else None)
        assert near(found, product_of(v, w, [(264, Rule())]), flips(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES[:2])
def test_layers_share_a_launch_and_have_low_rank_parts(tile, dtype):
    widths, ranks, inputs = (288, 96, 520), (40, 0, 7), 700
    *weights, x = draw(5, dtype, *((n, inputs) for n in widths), (inputs,))
    layers = []
    for n, rank, threshold in zip(widths, ranks, (0.3, 1.0, 0.6)):
        parts = tuple(f.cpu() * 0.2 for f in draw(n, dtype, (n, rank), (rank, inputs))) if rank else None
        layers.append((n, Rule(threshold=threshold, low_rank=parts)))
    w = torch.cat(weights)
    bias = torch.randn(sum(widths))
    product = VotingColumns(input_major(w), layers, bias, tile=tile)
    wanted = product_of(x, w, layers, bias)
    poison(HERE)
    found = product(x)
    assert near(found, wanted, 1e-3)
    assert torch.equal(found, product(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_add_to_a_stream_and_make_zeros(dtype):
    w, x, before = draw(8, dtype, (256, 512), (512,), (256,))
    other = Sums(1000, 1.0, HERE)
    rule = Rule(threshold=0.7)
    results = []
    for _ in range(3):
        other.words.fill_(7)
        stream = Stream(256, 1.0, dtype, HERE)
        product = VotingColumns(input_major(w * 0.02), [(256, rule)], into=stream.sums, scale=0.5, zeros=other)
        stream.begin(before)
        product(x)
        product(x)
        results.append(stream.sums.values)
        rounded, squares = stream.finish()
        assert not other.words.any()
    wanted = before.double() + product_of(x, w * 0.02, [(256, rule)])
    parts = 1 + 2 * 512 // 16  # each is off by half a step at most
    assert (results[0] - wanted).abs().max() < 0.5 * parts / stream.sums.steps
    assert (results[0] - wanted).abs().max() < torch.finfo(dtype).eps * wanted.abs().max()
    assert all(torch.equal(results[0], more) for more in results)
    assert torch.equal(rounded.flatten(), results[0].to(dtype))
    assert torch.allclose(squares, rounded.float().square().sum()[None], rtol=1e-4)


def test_a_sum_beyond_32_bits_takes_64():
    """Some columns get what no word of 32 bits holds, others do not; both are exact, and readers see them."""
    inputs, outputs = 512, 256
    (w,) = draw(3, torch.bfloat16, (outputs, inputs))
    w = w.mul(0.02)
    w[5], w[77] = 30000.0, -30000.0
    x = torch.ones(inputs, dtype=torch.bfloat16, device=HERE)
    stream = Stream(outputs, 2.0**-9, torch.bfloat16, HERE)  # 2^19 steps in 1: a word holds 4,096
    product = VotingColumns(input_major(w), [(outputs, Rule())], into=stream.sums)
    stream.begin(torch.zeros(outputs, dtype=torch.bfloat16, device=HERE))
    product(x)
    wanted = w.double().sum(1)
    assert set(stream.sums.wide.nonzero().flatten().tolist()) == {5, 77}
    assert (stream.sums.values - wanted).abs().max() < 1e-3
    gain = torch.ones(outputs, dtype=torch.bfloat16, device=HERE)
    (v,) = draw(4, torch.bfloat16, (64, outputs))
    next_one = VotingColumns(input_major(v), [(64, Rule())], taken=Input(stream.sums, gain, 1e-5), reads_all=True)
    n = (wanted * torch.rsqrt(wanted.square().mean() + 1e-5)).bfloat16()
    assert near(next_one(), product_of(n, v, [(64, Rule())]), flips(torch.bfloat16))
    own = VotingColumns(input_major(w), [(outputs, Rule())], reads_all=True)
    own.sums.steps = 2.0**22
    for _ in range(2):  # zeros are left behind
        assert near(own(x), wanted, 1e-3)
        assert not own.sums.words.any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_does_not_get_lost(value):
    (w,) = draw(0, torch.bfloat16, (256, 128))
    x = torch.ones(128, dtype=torch.bfloat16, device=HERE)
    product = VotingColumns(input_major(w), [(256, Rule(threshold=0.5))])
    good = product(x)
    x[3] = value
    assert product(x).isnan().all()
    x[3] = 1.0
    assert torch.equal(product(x), good)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_rows_are_the_formula(activation, dtype):
    w, x, gate, gain = draw(7, dtype, (1000, 528), (528,), (1000,), (528,))
    bias = torch.randn(1000)
    gain = (1.0 + 0.1 * gain.float()).to(dtype)
    a = ACTIVATED[activation](gate.double()).to(dtype)
    active = a.double().abs() > 0.3
    for sums, gates, norm in ((None, None, False), (filled(x, dtype), filled(gate, dtype), True)):
        v = normed(x, gain, 1e-5, True, dtype) if norm else x
        taken = Input(sums, gain, 1e-5) if norm else Input()
        product = VotingRows(w, 0.3, bias, taken, gates, activation)
        poison(HERE)
        found = product(None if norm else x, None if gates else gate)
        wanted = torch.where(active, a.double() * (v.double() @ w.double().T + bias.to(HERE)), 0.0)
        assert near(found, wanted, flips(dtype) * a.double().abs().clamp(min=0.3).max() if norm else 0.05)
        assert not found[~active].any()


@pytest.mark.skipif(not ON_GPU, reason="needs a GPU")
@pytest.mark.parametrize("early", [False, True])
def test_launches_that_overlap_compute_the_same_in_a_graph(early):
    """A chain of products that add to one stream, captured and replayed, has the bits of one that waits each time."""
    width = 1024
    weights = draw(1, torch.bfloat16, *((width, width) for _ in range(12)))
    (x,) = draw(2, torch.bfloat16, (width,))
    stream, middle, other = Stream(width, 1.0, torch.bfloat16, HERE), *(Sums(width, 2.0**20, HERE) for _ in range(2))
    gain = torch.ones(width, dtype=torch.bfloat16, device=HERE)
    chain = []
    for i, w in enumerate(weights):
        w = input_major(w * 0.03)
        mine, its = (middle, other) if i % 4 < 2 else (other, middle)
        if i % 2 == 0:
            taken = Input(stream.sums, gain, 1e-5)
            chain.append(VotingColumns(w, [(width, Rule(threshold=0.4))], taken=taken, into=mine, early=early))
        else:
            taken = Input(mine)
            rule = Rule(threshold=0.3)
            chain.append(VotingColumns(w, [(width, rule)], taken=taken, into=stream.sums, zeros=its, early=early))

    def run(wait):
        stream.begin(x)
        for product in chain:
            product()
            if wait:
                torch.cuda.synchronize()

    run(True)
    wanted = stream.sums.words.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(False)
    for _ in range(20):
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(stream.sums.words, wanted)
