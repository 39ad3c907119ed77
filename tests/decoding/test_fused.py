"""What a launch does besides its product, and attention in one launch, against the formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from gpu_products import DEVICE, FEW, FORMS, LAUNCHES, Operators, draw, kept_of
from hypothesis import given
from hypothesis import strategies as st

from resting.sparsifier import Rule, SparsifierError
from resting.sparsifier.decoding import cuda_layouts
from resting.sparsifier.decoding.contract import input_major
from resting.sparsifier.decoding.cuda_products import CudaColumns, CudaRows, InputNorm
from resting.sparsifier.decoding.cuda_triton import Launch
from resting.sparsifier.decoding.step.cuda_attention import SEEN, attend
from resting.sparsifier.decoding.step.cuda_sum import normed_sum
from resting.sparsifier.decoding.step.form import ACTIVATIONS

EPS = 1e-5
DTYPES = [torch.float16] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]  # the interpreter cuts bfloat16 off


def near(found, wanted, dtype, extra=4.0):
    """Equal up to a few roundings of the largest number."""
    bound = extra * torch.finfo(dtype).eps * wanted.double().abs().max().clamp(min=1.0)
    return bool(((found.double() - wanted.double()).abs() <= bound).all())


def norm_of(x, gain, parts=1, rounds_first=True):
    """RMSNorm as layers round it, and what a launch is told of it: the squares may come as several sums."""
    rate = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + EPS)
    squares = torch.stack([piece.float().square().sum() for piece in x.flatten().chunk(parts)])
    normed = (x.float() * rate).to(x.dtype) * gain if rounds_first else (x.float() * rate * gain).to(x.dtype)
    return normed, InputNorm(squares, gain, EPS, rounds_first)


def clear(x):
    """A threshold where no rounding could decide: in the widest gap of the smaller inputs."""
    scores = x.float().abs().flatten().cpu().sort().values
    at = int(scores.diff()[: len(scores) // 2].argmax())
    return Rule(threshold=float(scores[at] + scores[at + 1]) / 2)


@FEW
@given(
    *(st.integers(2, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(FORMS)),
    *(st.integers(1, 5), st.booleans(), st.integers(0, 10**6)),
)
def test_a_norm_in_the_launch_is_the_layer_s(inputs, outputs, dtype, launch, parts, rounds_first, seed):
    w, x, gain = draw(seed, dtype, (outputs, inputs), (1, 1, inputs), (inputs,))
    normed, norm = norm_of(x, gain if rounds_first else gain.float() + 1.0, parts, rounds_first)
    rule = clear(normed)
    found, squares = CudaColumns(input_major(w), [(outputs, rule)], launch=launch).fused(x, norm)
    assert near(found[0, 0], kept_of(normed[0, 0], rule) @ w.double().T, dtype)
    assert squares.numel() == 0


@FEW
@given(
    *(st.integers(2, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(FORMS)),
    *(st.booleans(), st.sampled_from(list(ACTIVATIONS)), st.sampled_from([1.0, 0.22]), st.integers(0, 10**6)),
)
def test_a_gate_and_a_residual_in_the_launch_are_the_block_s(
    inputs, outputs, dtype, launch, biased, activation, scale, seed
):
    w, both, before = draw(seed, dtype, (outputs, inputs), (1, 1, 2 * inputs), (1, 1, outputs))
    bias = torch.randn(outputs) if biased else None
    opened = ACTIVATIONS[activation](both[..., :inputs]) * both[..., inputs:]
    rule = clear(opened)
    product = CudaColumns(input_major(w), [(outputs, rule)], bias, launch)
    number = 1 + list(ACTIVATIONS).index(activation)
    found, squares = product.fused(both, gated=number, residual=before, scale=scale)
    wanted = kept_of(opened[0, 0], rule) @ w.double().T + (0.0 if bias is None else bias.to(DEVICE).double())
    assert near(found[0, 0], wanted * scale + before[0, 0].double(), dtype)
    assert squares.sum().item() == pytest.approx(found.double().square().sum().item(), rel=1e-4)


@pytest.mark.parametrize("launch", FORMS)
def test_partial_sums_add_up(launch):
    w, x = draw(5, torch.float16, (80, 300), (1, 300))
    product = CudaColumns(input_major(w), [(80, Rule(threshold=0.5))], torch.randn(80), launch)
    sums, _ = product.fused(x, keep_partial_sums=True)
    parts = launch.split if isinstance(launch, Launch) else 1 if launch.atomic else launch.parts(300)
    assert sums.shape == (parts, 80)
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
    found = CudaRows(w, rule.threshold).fused(x, gate, norm, 1)
    up = (normed.double() @ w.double().T).to(dtype).double()
    wanted = torch.where(active.double().abs() > rule.threshold, active.double() * up, 0.0)
    assert near(found, wanted, dtype)
    assert torch.equal(found == 0, wanted == 0)


@FEW
@given(
    st.sampled_from([(4, 2, 16), (3, 3, 8), (4, 1, 24), (2, 2, 12)]),
    st.sampled_from([0, 1, 7, SEEN - 1, SEEN, SEEN + 9, 2 * SEEN + 5]),
    *(st.sampled_from(DTYPES), st.integers(1, 5), st.sampled_from(["none", "rounded", "float", "of all"])),
    *(st.sampled_from([1.0, 0.5, 0.0]), st.sampled_from([None, 5, SEEN + 3]), st.sampled_from([0.0, 4.0])),
    st.integers(0, 10**6),
)
def test_attention_is_the_formula(shape, now, dtype, parts, norm, part, window, softcap, seed):
    heads, groups, size = shape
    length, rotary = 2 * SEEN + 16, 2 * int(part * size / 2)
    keys, values = draw(seed, dtype, *[(groups, length, size)] * 2)
    (qkv,) = draw(seed + 1, torch.float32, (parts, (heads + 2 * groups) * size))
    counts = (heads, groups) if norm == "of all" else (1, 1)
    gains = draw(seed + 2, dtype, *[(count * size,) for count in counts])
    rounds_first = norm != "float"
    gains = [gain if rounds_first else gain.float() + 1.0 for gain in gains]
    angle = torch.outer(torch.arange(length), 10000 ** -torch.linspace(0, 1, rotary // 2)).repeat(1, 2).to(DEVICE)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    before = keys.clone(), values.clone()
    at, counter = torch.tensor([now], device=DEVICE), torch.zeros(heads, dtype=torch.int32, device=DEVICE)
    told = (None, None) if norm == "none" else gains
    seen = window or 1 << 30
    more = EPS, rounds_first, norm == "of all", rotary, seen, size**-0.5, softcap
    found = attend(qkv, keys, values, cos, sin, at, counter, *told, *more)
    assert not counter.any()
    q, k, v = qkv.sum(0).to(dtype).split([heads * size, groups * size, groups * size])
    if norm == "of all":
        q, k = (norm_of(t, gain)[0] for t, gain in zip((q, k), gains))
    q, k, v = (t.view(-1, size) for t in (q, k, v))
    if norm in ("rounded", "float"):
        q, k = (norm_of(t, gain, 1, rounds_first)[0] for t, gain in zip((q, k), gains))

    def turned(t):
        first, half = t[:, :rotary].float(), rotary // 2
        other = torch.cat([-first[:, half:], first[:, :half]], -1)
        return torch.cat([(first * cos[now].float() + other * sin[now].float()).to(dtype), t[:, rotary:]], -1)

    q, k = turned(q), turned(k)
    begin = max(0, now + 1 - seen)
    ks, vs = (torch.cat([old[:, begin:now], new[:, None]], 1) for old, new in zip(before, (k, v)))
    ks, vs = (t.repeat_interleave(heads // groups, 0).double() for t in (ks, vs))
    scores = torch.einsum("hd,hld->hl", q.double(), ks) * size**-0.5
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    assert near(found[0, 0], torch.einsum("hl,hld->hd", scores.softmax(-1), vs).flatten(), dtype, 8.0)
    assert near(keys[:, now], k, dtype)
    assert near(values[:, now], v, dtype)
    others = torch.arange(length, device=DEVICE) != now
    assert torch.equal(keys[:, others], before[0][:, others])
    assert torch.equal(values[:, others], before[1][:, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounds_first", [True, False])
def test_a_normed_sum_is_the_formula(dtype, rounds_first):
    x, y, gain = draw(3, dtype, (1, 1, 70), (1, 1, 70), (70,))
    gain = gain if rounds_first else gain.float() + 1.0
    normed, _ = norm_of(y, gain, 1, rounds_first)
    found, squares = normed_sum(x, y, gain, EPS, rounds_first, 0.5)
    assert near(found, x.double() + 0.5 * normed.double(), dtype)
    assert squares.item() == pytest.approx(found.double().square().sum().item(), rel=1e-3)


def test_a_layout_is_measured_once_for_every_shape(monkeypatch):
    asked = []
    monkeypatch.setattr(cuda_layouts, "CHOSEN", {})
    monkeypatch.setattr(cuda_layouts, "remembered", lambda kind, what, device, measure: measure())
    monkeypatch.setattr(cuda_layouts, "fastest", lambda shape: asked.append(shape) or Launch(16, 16, 4, len(asked)))
    at = cuda_layouts.Shape("columns", 32, 48, torch.float16, torch.device("cuda", 0), (32,))
    others = [at._replace(device=torch.device("cuda", 1)), at._replace(widths=()), at._replace(kernel="rows")]
    assert [cuda_layouts.chosen(shape).split for shape in (at, at, *others, at)] == [1, 1, 2, 3, 4, 1]


def test_what_a_launch_does_not_do_together_is_refused():
    w, x, both, gain = draw(1, torch.float16, (32, 48), (1, 48), (1, 96), (48,))
    product = CudaColumns(input_major(w), [(32, Rule(threshold=0.5))], launch=LAUNCHES[0])
    _, norm = norm_of(x, gain)
    with pytest.raises(SparsifierError, match="a norm or a gate"):
        product.fused(both, norm, gated=1)
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
        counter = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        attend(qkv.float(), keys, values, table, table, at, counter, None, None, 0.0, True, False, 16, 99, 0.25, 0.0)
        normed_sum(x, x, gain, EPS, True, 1.0)
    operators.check(5)


def test_layouts_are_written_down_in_every_part(monkeypatch):
    shape = cuda_layouts.Shape("rows", 32, 48, torch.float16, torch.device("cuda", 0))
    monkeypatch.setattr(cuda_layouts, "remembered", lambda kind, what, device, measure: [512, 8, 4, 1])
    for _ in range(2):
        monkeypatch.setattr(cuda_layouts, "CHOSEN", {})
        assert cuda_layouts.chosen(shape) == Launch(512, 8, 4, 1)
        assert list(cuda_layouts.CHOSEN) == ["rows 32x48 torch.float16 on cuda:0"]


@FEW
@given(
    *(st.integers(2, 90), st.integers(1, 90), st.sampled_from(DTYPES), st.sampled_from(FORMS)),
    *(st.sampled_from(["plain", "normed", "gated"]), st.integers(0, 10**6)),
)
def test_a_product_that_masks_nothing_needs_no_list(inputs, outputs, dtype, launch, before, seed):
    w, x, up, gain = draw(seed, dtype, (outputs, inputs), (1, inputs), (1, inputs), (inputs,))
    product = CudaColumns(input_major(w), [(outputs, Rule())], launch=launch, reads_all=True)
    normed, norm = norm_of(x, gain)
    found, wanted = {
        "plain": (product.fused(x), x),
        "normed": (product.fused(x, norm), normed),
        "gated": (product.fused(torch.cat([x, up], 1), gated=1), F.silu(x) * up),
    }[before]
    assert near(found[0][0], wanted[0].double() @ w.double().T, dtype)
    with pytest.raises(SparsifierError, match="does not read every input"):
        CudaColumns(input_major(w), [(outputs, Rule(threshold=0.1))], launch=launch, reads_all=True)
