"""The kernel that masks and counts in one pass keeps what plain torch keeps, bit for bit; here in an interpreter."""

from __future__ import annotations

import os

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.teal import Teal
from resting.sparsifier import AllButFirst, Meter, fused_masking
from resting.sparsifier.policy import LastFraction

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or the interpreter", allow_module_level=True)

from resting.sparsifier import mask_kernel  # noqa: E402

DEVICE = torch.device("cpu") if os.environ.get("TRITON_INTERPRET") == "1" else torch.device("cuda", 0)


@settings(max_examples=12, deadline=None)
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 5),
    width=st.sampled_from([1, 7, 64, 5000]),
    dense=st.integers(0, 5),
    by_channel=st.booleans(),
    shifted=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    seed=st.integers(0, 99),
)
def test_it_keeps_and_counts_what_the_formula_says(batch, length, width, dense, by_channel, shifted, dtype, seed):
    if DEVICE.type == "cpu" and dtype is torch.bfloat16:
        shifted = False  # the interpreter cuts bfloat16 off where a GPU rounds
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, length, width, generator=g).to(dtype)
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 0.5, -0.5]).to(dtype)
    x.view(-1)[: min(len(special), x.numel())] = special[: x.numel()]
    cutoff = torch.rand(width, generator=g).to(dtype) if by_channel else 0.5
    shift = torch.randn(width, generator=g).to(dtype) if shifted else 0.0
    moved = x - shift
    expected = torch.where(moved.abs() <= cutoff, torch.zeros_like(x), moved)
    expected[:, :dense] = x[:, :dense]
    vectors = [v.to(DEVICE) if isinstance(v, torch.Tensor) else v for v in (cutoff, shift)]
    kept, counts = mask_kernel.kept_and_counted(x.to(DEVICE), *vectors, length, dense)
    assert torch.equal(kept.cpu().isnan(), expected.isnan())
    assert torch.equal(kept.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))
    assert counts.tolist() == [sum(1 for v in row if v != 0) for row in expected.flatten(0, 1).tolist()]
    of_all = mask_kernel.nonzero_counts(x.to(DEVICE))
    assert of_all.tolist() == [sum(1 for v in row if v != 0) for row in x.flatten(0, 1).tolist()]


def test_the_probe_finds_a_kernel_that_works_and_one_that_does_not(monkeypatch):
    mask_kernel.works.cache_clear()
    assert mask_kernel.works(DEVICE)
    mask_kernel.works.cache_clear()
    monkeypatch.setattr(mask_kernel, "kept_and_counted", lambda x, *_: (x, torch.zeros(3)))
    assert not mask_kernel.works(DEVICE)
    mask_kernel.works.cache_clear()

    def no_compiler(*_):
        raise RuntimeError("no C compiler")

    monkeypatch.setattr(mask_kernel, "kept_and_counted", no_compiler)
    assert not mask_kernel.works(DEVICE)
    mask_kernel.works.cache_clear()


@pytest.mark.parametrize("policy", [AllButFirst(1), LastFraction(0.5)], ids=str)
@pytest.mark.parametrize("method", [Teal(0.5), Cats(0.3), Chess(0.3, attention=True)], ids=lambda m: m.name)
def test_a_model_under_the_kernel_is_the_model_under_plain_torch(method, policy, calibration, monkeypatch):
    model = build("llama").to(DEVICE)
    ids = torch.randint(5, 97, (2, 20), generator=torch.Generator().manual_seed(3)).to(DEVICE)
    plan = method.fit(model, calibration)

    def run():
        meter = Meter()
        with torch.no_grad(), plan.applied(model, policy, meter):
            return model(input_ids=ids).logits, meter.byte_sparsity(), meter.site_sparsity()

    monkeypatch.setattr(fused_masking, "is_for_kernels", lambda x: False)
    expected, expected_bytes, expected_sites = run()
    assert mask_kernel.works(DEVICE)
    used, counted = [], []
    real, real_count = mask_kernel.kept_and_counted, mask_kernel.nonzero_counts
    monkeypatch.setattr(mask_kernel, "kept_and_counted", lambda *a: used.append(1) or real(*a))
    monkeypatch.setattr(mask_kernel, "nonzero_counts", lambda x: counted.append(1) or real_count(x))
    monkeypatch.setattr(fused_masking, "is_for_kernels", lambda x: True)
    monkeypatch.setattr(fused_masking, "SMALLEST", 1)
    found, found_bytes, found_sites = run()
    assert used
    assert torch.equal(found, expected)
    assert (found_bytes, found_sites) == (expected_bytes, expected_sites)
    assert bool(counted) == (len(plan.rules) < 7 * len(model.model.layers))  # inputs that no rule masks as well
    used.clear()
    with torch.enable_grad(), plan.applied(model, policy):  # a derivative is taken of plain torch
        embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
        model(inputs_embeds=embedded).logits.sum().backward()
    assert embedded.grad is not None
    assert not used
