"""Finds orthogonal bases: of the inputs' second moment, of a matrix, or at random."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from resting.sparsifier.errors import DivergedError, SparsifierError


def eigenbasis(gram: Tensor) -> Tensor:
    """Computes the eigenvectors of a second moment, those of the largest eigenvalues first.

    Signs are fixed by the largest entry of each, so that they do not depend on the library.

    Parameters
    ----------
    gram : Tensor [..., d, d]

    Returns
    -------
    Tensor [..., d, d]
        One eigenvector a column, in fp64.
    """
    gram = gram.double()
    if not bool(torch.isfinite(gram).all()):
        raise DivergedError("a second moment is NaN or infinite: it has no eigenvectors")
    _, vectors = torch.linalg.eigh(gram)
    return _signed(vectors.flip(-1))


def right_singular_basis(weight: Tensor) -> Tensor:
    """Computes all right singular vectors of a matrix [out, d], those of the largest singular values first.

    Where the matrix has fewer rows than columns, an orthogonal basis of its null space completes them.

    Returns
    -------
    Tensor [d, d]
        One a column, in fp64.
    """
    weight = weight.double()
    if not bool(torch.isfinite(weight).all()):
        raise DivergedError("a matrix has entries that are NaN or infinite: it has no singular vectors")
    return _signed(torch.linalg.svd(weight, full_matrices=True)[2].mT)


def random_rotation(size: int, seed: int) -> Tensor:
    """Draws an orthogonal matrix [size, size] evenly from all of them, in fp64."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * torch.sign(torch.diagonal(r))


def head_bases(gram: Tensor, groups: int, size: int) -> Tensor:
    """Computes a basis for every head of keys and values, from the second moment of the input of o.

    Parameters
    ----------
    gram : Tensor [heads * size, heads * size]
        Heads that share one of keys and values lie beside each other.
    groups : int
        Heads of keys and values.
    size : int
        Channels of a head.

    Returns
    -------
    Tensor [groups, size, size]
        The eigenvectors of the sum of second moments of the heads that share one, in fp64.
    """
    heads = len(gram) // size
    if heads * size != len(gram) or heads % groups:
        raise SparsifierError(f"{len(gram)} channels are no {groups} groups of heads of {size} channels")
    blocks = gram.unflatten(0, (heads, size)).unflatten(-1, (heads, size)).diagonal(dim1=0, dim2=2)
    return eigenbasis(blocks.permute(2, 0, 1).unflatten(0, (groups, heads // groups)).sum(1))


def sum_of_moments(grams: Iterable[Tensor]) -> Tensor:
    """Sums second moments, each over its trace, so that a layer with larger inputs has no larger say."""
    return sum((gram / gram.trace() for gram in (g.double() for g in grams)), torch.zeros((), dtype=torch.float64))


def _signed(vectors: Tensor) -> Tensor:
    largest = vectors.gather(-2, vectors.abs().argmax(-2, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)
