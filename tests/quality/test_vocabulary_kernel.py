"""Sums over the vocabulary in one reading give what the definition gives in double precision."""

from __future__ import annotations

import math
import os

import pytest
import torch
from families import build

from resting.baselines.teal import Teal
from resting.benchmarks.quality import perplexity
from resting.sparsifier import AllButFirst

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    pytest.skip("kernels need a GPU or the interpreter", allow_module_level=True)

from resting.benchmarks.quality import vocabulary_kernel

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")


def by_definition(x, y, following):
    """From -log q(next) and sum p log(p / q), in fp64."""
    p, q = x.double().softmax(-1), y.double().softmax(-1)
    nll = [-math.log(row[k]) for row, k in zip(q.tolist(), following.tolist())]
    return torch.tensor(nll).double(), (p * (p.log() - q.log())).sum(-1)


@pytest.mark.parametrize("vocabulary", [3, 2048, 5001])
@pytest.mark.parametrize("size", [0.01, 1.0, 30.0])
def test_it_gives_the_definition(vocabulary, size):
    g = torch.Generator().manual_seed(vocabulary)
    x, y = (torch.randn(4, vocabulary, generator=g) * math.sqrt(size) for _ in range(2))
    y = x + 0.1 * y
    following = torch.randint(0, vocabulary, (4,), generator=g)
    nll, kl = vocabulary_kernel.nll_and_kl(x.to(DEVICE), y.to(DEVICE), following.to(DEVICE))
    expected_nll, expected_kl = by_definition(x, y, following)
    assert torch.allclose(nll.cpu().double(), expected_nll, rtol=1e-5, atol=1e-5)
    assert torch.allclose(kl.cpu().double(), expected_kl, rtol=1e-4, atol=2e-6)


def test_a_model_beside_itself_has_no_divergence():
    x = torch.randn(3, 3000, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    _, kl = vocabulary_kernel.nll_and_kl(x, x.clone(), torch.tensor([0, 1, 2999], device=DEVICE))
    assert kl.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_not_hidden(bad):
    x = torch.randn(2, 3000, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[1, 2500] = bad
    nll, kl = vocabulary_kernel.nll_and_kl(x.to(DEVICE), y.to(DEVICE), torch.tensor([0, 1], device=DEVICE))
    assert [bool(torch.isfinite(v)) for v in (*nll, *kl)] == [True, False, True, False]


def test_scores_are_those_of_plain_torch(calibration, monkeypatch):
    vocabulary_kernel.works.cache_clear()
    assert vocabulary_kernel.works(DEVICE)
    model = build("llama").to(DEVICE)
    ids = torch.randint(5, 97, (5, 33), generator=torch.Generator().manual_seed(3))
    plan = Teal(0.5).fit(model, calibration)

    def score():
        return perplexity.score(perplexity.DenseReference(model, ids, 2), plan, AllButFirst(1))

    monkeypatch.setattr(perplexity, "_has_kernel", lambda device: False)
    expected = score()
    monkeypatch.setattr(perplexity, "_has_kernel", lambda device: True)
    found = score()
    assert found.nll == pytest.approx(expected.nll, rel=1e-6)
    assert found.kl == pytest.approx(expected.kl, rel=1e-5)
    assert found.byte_sparsity == expected.byte_sparsity
