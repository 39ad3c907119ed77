"""What a launch does besides its product, and attention in one launch, against the formula."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from gpu_products import DEVICE, FEW, LAUNCHES, Operators, draw, kept_of
from hypothesis import given
from hypothesis import strategies as st

from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency import timing
from resting.benchmarks.latency.gpu import layouts
from resting.benchmarks.latency.gpu.attention import SEEN, attend
from resting.benchmarks.latency.gpu.blocks import Attention
from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding import cuda_layouts
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns, CudaRows, Norm
from resting.sparsifier.decoding.cuda_triton import Launch

EPS = 1e-5
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # the interpreter cuts bfloat16 off


def near(found, wanted, dtype, extra=4.0):
    """Equal up to a few roundings of the largest number."""
    bound = extra * torch.finfo(dtype).eps * wanted.double().abs().max().clamp(min=1.0)
    return bool(((found.double() - wanted.double()).abs() <= bound).all())


def norm_of(x, gain, parts=1):
    """RMSNorm as layers round it, and what a launch is told of it: the squares may come as several sums."""
    rate = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    squares = torch.stack([piece.float().square().sum() for piece in x.flatten().chunk(parts)])
    return (x.float() * rate).to(x.dtype) * gain, Norm(squares, gain, EPS)


def clear(x):
    """A threshold where no rounding could decide: in the widest gap of the smaller inputs."""
    scores = x.float().abs().flatten().cpu().sort().values
    at = int(scores.diff()[: len(scores) // 2].argmax())
    return Rule(threshold=float(scores[at] + scores[at + 1]) / 2)


@FEW
@given(
    *(st.integers(2, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(LAUNCHES)),
    *(st.integers(1, 5), st.integers(0, 10**6)),
)
def test_a_norm_in_the_launch_is_the_layer_s(inputs, outputs, dtype, launch, parts, seed):
    w, x, gain = draw(seed, dtype, (outputs, inputs), (1, 1, inputs), (inputs,))
    normed, norm = norm_of(x, gain, parts)
    rule = clear(normed)
    found, squares = CudaColumns(input_major(w), [(outputs, rule)], launch=launch).fused(x, norm)
    assert near(found[0, 0], kept_of(normed[0, 0], rule) @ w.double().T, dtype)
    assert squares.numel() == 0


@FEW
@given(
    *(st.integers(2, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(LAUNCHES)),
    *(st.booleans(), st.integers(0, 10**6)),
)
def test_a_gate_and_a_residual_in_the_launch_are_the_block_s(inputs, outputs, dtype, launch, biased, seed):
    w, both, before = draw(seed, dtype, (outputs, inputs), (1, 1, 2 * inputs), (1, 1, outputs))
    bias = torch.randn(outputs) if biased else None
    opened = F.silu(both[..., :inputs]) * both[..., inputs:]
    rule = clear(opened)
    product = CudaColumns(input_major(w), [(outputs, rule)], bias, launch)
    found, squares = product.fused(both, gated=True, residual=before)
    wanted = kept_of(opened[0, 0], rule) @ w.double().T + (0.0 if bias is None else bias.to(DEVICE).double())
    assert near(found[0, 0], wanted + before[0, 0].double(), dtype)
    assert squares.sum().item() == pytest.approx(found.double().square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_partial_sums_add_up(launch):
    w, x = draw(5, torch.float16, (80, 300), (1, 300))
    product = CudaColumns(input_major(w), [(80, Rule(threshold=0.5))], torch.randn(80), launch)
    sums, _ = product.fused(x, keep_partial_sums=True)
    assert sums.shape == (launch.split, 80)
    assert near(sums.sum(0), product(x)[0], torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_low_rank_part_reads_the_same_input(dtype):
    w, u, v, x, gain = draw(2, dtype, (33, 60), (33, 7), (7, 60), (1, 60), (60,))
    normed, norm = norm_of(x, gain)
    rule = clear(normed)
    kept = kept_of(normed[0], rule)
    wanted = kept @ w.double().T + (normed[0].double() - kept) @ v.double().T @ u.double().T
    rule = Rule(threshold=rule.threshold, low_rank=(u.cpu(), v.cpu()))
    found, _ = CudaColumns(input_major(w), [(33, rule)], launch=LAUNCHES[1]).fused(x, norm)
    assert near(found[0], wanted, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_take_the_norm_and_the_activation(dtype):
    w, x, gate, gain = draw(8, dtype, (70, 50), (1, 50), (1, 70), (50,))
    normed, norm = norm_of(x, gain)
    active = F.silu(gate)
    rule = clear(active)
    found = CudaRows(w, rule.threshold).fused(x, gate, norm)
    up = (normed.double() @ w.double().T).to(dtype).double()
    wanted = torch.where(active.double().abs() > rule.threshold, active.double() * up, 0.0)
    assert near(found, wanted, dtype)
    assert torch.equal(found == 0, wanted == 0)


@FEW
@given(
    st.sampled_from([(4, 2, 16), (3, 3, 8), (8, 1, 32)]),
    st.sampled_from([0, 1, 7, SEEN - 1, SEEN, SEEN + 9, 2 * SEEN + 5]),
    *(st.sampled_from(DTYPES), st.integers(1, 5), st.booleans(), st.integers(0, 10**6)),
)
def test_attention_is_the_formula(shape, now, dtype, parts, normed, seed):
    heads, groups, size = shape
    length = 2 * SEEN + 16
    keys, values, q_gain, k_gain = draw(seed, dtype, *[(groups, length, size)] * 2, *[(size,)] * 2)
    (qkv,) = draw(seed + 1, torch.float32, (parts, (heads + 2 * groups) * size))
    angle = torch.outer(torch.arange(length), 10000 ** -torch.linspace(0, 1, size // 2)).repeat(1, 2).to(DEVICE)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    gains = (q_gain, k_gain) if normed else (None, None)
    before = keys.clone(), values.clone()
    at = torch.tensor([now], device=DEVICE)
    found = attend(qkv, keys, values, cos, sin, at, *gains, size**-0.5, EPS)
    q, k, v = qkv.sum(0).to(dtype).view(-1, size).split([heads, groups, groups])
    if normed:
        q, k = norm_of(q, q_gain)[0], norm_of(k, k_gain)[0]
    q, k = (
        (t.float() * cos[now] + torch.cat([-t[:, size // 2 :], t[:, : size // 2]], -1).float() * sin[now]).to(dtype)
        for t in (q, k)
    )
    ks, vs = (torch.cat([old[:, :now], new[:, None]], 1) for old, new in zip(before, (k, v)))
    ks, vs = (t.repeat_interleave(heads // groups, 0).double() for t in (ks, vs))
    weights = (torch.einsum("hd,hld->hl", q.double(), ks) * size**-0.5).softmax(-1)
    assert near(found[0, 0], torch.einsum("hl,hld->hd", weights, vs).flatten(), dtype)
    assert near(keys[:, now], k, dtype)
    assert near(values[:, now], v, dtype)
    others = torch.arange(length, device=DEVICE) != now
    assert torch.equal(keys[:, others], before[0][:, others])
    assert torch.equal(values[:, others], before[1][:, others])


def test_heads_that_are_no_power_of_two_are_refused():
    attention = SimpleNamespace(head_dim=24, config=SimpleNamespace(num_key_value_heads=2))
    with pytest.raises(SuiteError, match="these have 24"):
        Attention(attention, 16)


def shape(i, kernel="columns"):
    return cuda_layouts.Shape(kernel, 32, 48 - i, torch.float16, torch.device("cpu"))


def fake(monkeypatch, shapes, choices, step):
    """A model whose step takes what `step` makes of the layouts chosen; and where these are written down."""
    chosen = {}
    monkeypatch.setattr(cuda_layouts, "CHOSEN", chosen)
    monkeypatch.setattr(cuda_layouts, "finalists", lambda shape: choices)
    monkeypatch.setattr(layouts, "shapes_of", lambda plan: shapes[plan])
    monkeypatch.setattr(timing, "interleaved", lambda calls, steps, clock: {name: [f(0)] for name, f in calls.items()})

    def decode(plan, compiled):
        now = step([chosen.get(str(shape(i)), choices[0]).split for i in range(4)])
        return SimpleNamespace(begin=lambda: None, step=lambda i: now, decoder=SimpleNamespace(blocks=[plan]))

    return SimpleNamespace(ids=torch.zeros(1, 9), prompt=2, decode=decode), chosen


def test_layouts_are_chosen_where_they_run(monkeypatch):
    choices = [Launch(16, 16, 4, split) for split in (1, 2, 4)]

    def step(splits):
        """The second product is best with what the first chooses in the second pass, and it with what that has then."""
        first, second, *others = splits
        return abs(first - second) + 3 * abs(second - 4) + sum(abs(split - 2) for split in others)

    model, chosen = fake(monkeypatch, [{shape(i) for i in range(4)}], choices, step)
    layouts.tune_layouts(model, 0, set())
    assert [chosen[str(shape(i))].split for i in range(4)] == [4, 4, 2, 2]


def test_what_is_settled_stays(monkeypatch):
    choices = [Launch(16, 16, 4, split) for split in (1, 2)]
    model, chosen = fake(monkeypatch, [{shape(0), shape(1)}, {shape(1), shape(2, "dense")}], choices, lambda s: -sum(s))
    settled = set()
    for plan in range(2):
        layouts.tune_layouts(model, plan, settled)
        monkeypatch.setattr(cuda_layouts, "finalists", lambda shape: choices[:1])
    assert settled == {shape(0), shape(1), shape(2, "dense")}
    assert [chosen[str(at)].split for at in (shape(0), shape(1), shape(2, "dense"))] == [2, 2, 1]


def test_a_layout_that_is_preferred_is_used(monkeypatch):
    at = cuda_layouts.Shape("columns", 32, 48, torch.float16, torch.device("cuda", 0), (32,))
    monkeypatch.setattr(cuda_layouts, "CHOSEN", {})
    monkeypatch.setattr(cuda_layouts, "finalists", lambda shape: [Launch(16, 16, 4, 1), Launch(16, 16, 4, 2)])
    assert cuda_layouts.chosen(at).split == 1
    cuda_layouts.prefer(Launch(16, 16, 4, 2), at)
    assert cuda_layouts.chosen(at).split == 2
    for other in (
        at._replace(device=torch.device("cuda", 1)),
        at._replace(widths=()),
        at._replace(kernel="rows"),
    ):
        assert cuda_layouts.chosen(other).split == 1


def test_a_choice_that_fails_leaves_the_layout_as_it_was(monkeypatch):
    model, chosen = fake(monkeypatch, [{shape(0)}], [Launch(64, 64, 4, 9)], lambda splits: 1)
    first = model.decode

    def decode(plan, compiled):
        if chosen:
            raise SparsifierError("no kernel")
        return first(plan, compiled)

    model.decode = decode
    settled = set()
    with pytest.raises(SparsifierError, match="no kernel"):
        layouts.tune_layouts(model, 0, settled)
    assert list(chosen.values()) == [cuda_layouts.SMALLEST]
    assert not settled


def test_what_a_launch_does_not_do_together_is_refused():
    w, x, both, gain = draw(1, torch.float16, (32, 48), (1, 48), (1, 96), (48,))
    product = CudaColumns(input_major(w), [(32, Rule(threshold=0.5))], launch=LAUNCHES[0])
    _, norm = norm_of(x, gain)
    with pytest.raises(SparsifierError, match="a norm or a gate"):
        product.fused(both, norm, gated=True)
    with pytest.raises(SparsifierError, match="keeps its partial sums"):
        product.fused(x, residual=x[:, :32], keep_partial_sums=True)
    with pytest.raises(SparsifierError, match="a residual has 32 numbers here, not \\[1, 48\\]"):
        product.fused(x, residual=x)


def test_operators_are_registered_with_all_they_do():
    dtype = torch.float16
    w, x, gain, qkv = draw(1, dtype, (32, 48), (1, 48), (48,), (2, 64))
    keys, values, table = draw(2, dtype, (1, 8, 16), (1, 8, 16), (8, 16))
    product = CudaColumns(input_major(w), [(32, Rule(threshold=0.5))], launch=LAUNCHES[1])
    _, norm = norm_of(x, gain)
    rows = CudaRows(w, 0.5)
    with Operators() as operators:
        product.fused(x, norm, residual=x[:, :32])
        product.fused(x, norm, keep_partial_sums=True)
        rows.fused(x, x[:, :32], norm)
        at = torch.tensor([3], device=DEVICE)
        attend(qkv.float(), keys, values, table, table, at, None, None, 0.25, 0.0)
    operators.check(4)


def test_layouts_are_written_down_in_every_part(monkeypatch):
    shape = cuda_layouts.Shape("rows", 32, 48, torch.float16, torch.device("cuda", 0))
    monkeypatch.setattr(cuda_layouts, "finalists", lambda shape: [Launch(512, 8, 4, 1)])
    for _ in range(2):
        monkeypatch.setattr(cuda_layouts, "CHOSEN", {})
        assert cuda_layouts.chosen(shape).outputs == 8
        assert list(cuda_layouts.CHOSEN) == ["rows 32x48 torch.float16 on cuda:0"]


@FEW
@given(
    *(st.integers(2, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(LAUNCHES)),
    *(st.sampled_from(["plain", "normed", "gated"]), st.integers(0, 10**6)),
)
def test_a_product_that_masks_nothing_needs_no_list(inputs, outputs, dtype, launch, before, seed):
    w, x, up, gain = draw(seed, dtype, (outputs, inputs), (1, inputs), (1, inputs), (inputs,))
    product = CudaColumns(input_major(w), [(outputs, Rule())], launch=launch, reads_all=True)
    normed, norm = norm_of(x, gain)
    found, wanted = {
        "plain": (product.fused(x), x),
        "normed": (product.fused(x, norm), normed),
        "gated": (product.fused(torch.cat([x, up], 1), gated=True), F.silu(x) * up),
    }[before]
    assert near(found[0][0], wanted[0].double() @ w.double().T, dtype)
    with pytest.raises(SparsifierError, match="does not read every input"):
        CudaColumns(input_major(w), [(outputs, Rule(threshold=0.1))], launch=launch, reads_all=True)
