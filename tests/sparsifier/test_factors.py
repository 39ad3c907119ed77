"""Low-rank factors of weights against the singular value decomposition in float64."""

from __future__ import annotations

import pytest
import torch

from resting.sparsifier import SparsifierError
from resting.sparsifier.low_rank import Factors

SHAPES = [(48, 32), (16, 32), (32, 32), (96, 130)]
TOLERANCE = 3e-4
"""Singular vectors of near values mix in fp32; entries are of size 1."""


def weight(out=96, width=130, seed=0):
    return torch.randn(out, width, generator=torch.Generator().manual_seed(seed))


def best(w, rank):
    """The best approximation of rank `rank` (Eckart and Young), and its error in the Frobenius norm."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank], float(s[rank:].square().sum().sqrt())


def product(factors):
    return factors[0].double() @ factors[1].double()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 5, 16])
def test_exact_factors_are_the_best_approximation(shape, rank):
    w = weight(*shape)
    u, v = Factors().low_rank(w, rank)
    assert (u.shape, v.shape) == ((shape[0], rank), (rank, shape[1]))
    assert u.dtype == v.dtype == torch.float32
    expected, least = best(w, rank)
    torch.testing.assert_close(product((u, v)), expected, rtol=0, atol=TOLERANCE)
    assert float((product((u, v)) - w.double()).norm()) == pytest.approx(least, rel=1e-6, abs=1e-4)


def test_u_is_orthonormal_and_v_carries_the_singular_values():
    w = weight()
    u, v = Factors().low_rank(w, 20)
    torch.testing.assert_close(u.T @ u, torch.eye(20), rtol=0, atol=1e-5)
    torch.testing.assert_close(v.norm(dim=1).double(), torch.linalg.svdvals(w.double())[:20], rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_full_rank_gives_the_weight_back(shape):
    w = weight(*shape)
    torch.testing.assert_close(product(Factors().low_rank(w, min(shape))), w.double(), rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("rank", [8, 64])
def test_randomised_factors_are_within_2_percent_of_the_least_error(rank):
    """On a Gaussian weight, whose spectrum is flat: the hard case. 80 directions of 160 are sketched."""
    w = weight(160, 200)
    least = best(w, rank)[1]
    error = float((product(Factors().low_rank(w, rank, "randomised")) - w.double()).norm())
    assert least * (1 - 1e-6) <= error <= 1.02 * least


def test_randomised_factors_repeat_and_leave_the_generator_alone():
    w = weight(160, 200)
    torch.manual_seed(3)
    a = Factors().low_rank(w, 64, "randomised")
    drawn = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(3))
    b = Factors().low_rank(w, 64, "randomised")
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], Factors().low_rank(w, 64)[0])


@pytest.mark.parametrize("rank", [0, -1, 97])
def test_a_rank_out_of_range_is_named(rank):
    with pytest.raises(SparsifierError, match=rf"the rank of a \[96, 130\] weight is in 1 to 96, got {rank}"):
        Factors().low_rank(weight(), rank)


class Again(Exception):
    pass


@pytest.fixture
def no_svd(monkeypatch):
    """A switch: from its call on, a decomposition raises."""

    def refuse(*args, **kwargs):
        raise Again

    def switch():
        monkeypatch.setattr(torch.linalg, "svd", refuse)
        monkeypatch.setattr(torch, "svd_lowrank", refuse)

    return switch


@pytest.mark.parametrize("algorithm", ["exact", "randomised"])
def test_a_file_saves_the_second_decomposition(tmp_path, no_svd, algorithm):
    w = weight()
    first = Factors(tmp_path).low_rank(w, 20, algorithm)
    no_svd()
    for rank in (20, 7):
        again = Factors(tmp_path).low_rank(w.clone(), rank, algorithm)
        assert torch.equal(again[0], first[0][:, :rank])
        assert torch.equal(again[1], first[1][:rank])
    with pytest.raises(Again):
        Factors().low_rank(w, 20, algorithm)
    assert len(list(tmp_path.iterdir())) == 1


def test_memory_saves_it_too_and_a_larger_rank_does_not(no_svd):
    w, factors = weight(), Factors()
    factors.low_rank(w, 20)
    no_svd()
    assert factors.low_rank(w, 25)[0].shape == (96, 25)
    with pytest.raises(Again):
        factors.low_rank(w, 90)


def test_a_file_of_a_smaller_rank_is_replaced(tmp_path, no_svd):
    w = weight()
    Factors(tmp_path).low_rank(w, 5)
    large = Factors(tmp_path).low_rank(w, 90)
    torch.testing.assert_close(product(large), best(w, 90)[0], rtol=0, atol=TOLERANCE)
    no_svd()
    assert torch.equal(Factors(tmp_path).low_rank(w, 90)[0], large[0])


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\xff" * len(b)])
def test_a_damaged_file_is_computed_again(tmp_path, no_svd, damage):
    w = weight()
    expected = Factors(tmp_path).low_rank(w, 20)
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert all(map(torch.equal, Factors(tmp_path).low_rank(w, 20), expected))
    no_svd()
    assert all(map(torch.equal, Factors(tmp_path).low_rank(w, 20), expected))


def test_another_weight_or_algorithm_is_another_file(tmp_path):
    a, b = weight(seed=0), weight(seed=1)
    factors = Factors(tmp_path)
    for w in (a, b):
        torch.testing.assert_close(product(factors.low_rank(w, 20)), best(w, 20)[0], rtol=0, atol=TOLERANCE)
    factors.low_rank(a, 20, "randomised")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_weight_that_was_written_to_is_decomposed_again():
    w, factors = weight(), Factors()
    factors.low_rank(w, 20)
    w.mul_(-2.0)
    torch.testing.assert_close(product(factors.low_rank(w, 20)), best(w, 20)[0], rtol=0, atol=TOLERANCE)


def test_a_short_dtype_is_decomposed_in_fp32():
    w = weight().to(torch.bfloat16)
    u, v = Factors().low_rank(w, 20)
    assert u.dtype == torch.float32
    torch.testing.assert_close(product((u, v)), best(w.float(), 20)[0], rtol=0, atol=TOLERANCE)


def test_a_weight_at_the_address_of_a_freed_one_is_decomposed_itself():
    factors = Factors()
    for seed in range(20):
        w = weight(64, 64, seed)
        torch.testing.assert_close(product(factors.low_rank(w, 64)), w.double(), rtol=0, atol=TOLERANCE)
        del w


@pytest.mark.parametrize("view", [lambda w: w.T, lambda w: w[:32]])
def test_a_view_of_a_weight_is_decomposed_itself(view):
    w, factors = weight(64, 64), Factors()
    factors.low_rank(w, 5)
    torch.testing.assert_close(product(factors.low_rank(view(w), 5)), best(view(w), 5)[0], rtol=0, atol=TOLERANCE)


def test_the_same_values_in_another_shape_are_another_file(tmp_path):
    w = weight(8, 16)
    Factors(tmp_path).low_rank(w, 2)
    u, v = Factors(tmp_path).low_rank(w.clone().view(16, 8), 2)
    assert (u.shape, v.shape) == ((16, 2), (2, 8))
