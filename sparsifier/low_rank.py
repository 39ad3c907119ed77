"""Computes truncated singular value decompositions of weights, each once."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from resting.sparsifier import fingerprint
from resting.sparsifier.errors import DivergedError, SparsifierError
from resting.sparsifier.files import replacing

Algorithm = Literal["exact", "randomised"]
OVERSAMPLING, ITERATIONS = 16, 4
"""Extra directions and power iterations of the randomised decomposition (Halko et al., 2011)."""


class Factors:
    """Keeps low-rank approximations of weights in memory and, where there is a folder, on disk.

    Parameters
    ----------
    folder : Path, optional
        Keeps one file per weight, named by the weight's hash.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        # Weights are held too, so that no other tensor can come to lie at the address of one.
        self._known: dict[tuple[Any, ...], tuple[Tensor, str, dict[str, Tensor]]] = {}

    def low_rank(self, weight: Tensor, rank: int, algorithm: Algorithm = "exact") -> tuple[Tensor, Tensor]:
        """Gives U [out, rank] and V [rank, in], fp32 on the CPU, such that U V is the best approximation of `weight`.

        Singular values are in V, as in R-Sparse: U has orthonormal columns.

        Parameters
        ----------
        weight : Tensor [out, in]
        rank : int
        algorithm : {"exact", "randomised"}
            `torch.linalg.svd`, or `torch.svd_lowrank` for weights whose exact decomposition takes minutes.

        Raises
        ------
        SparsifierError
            If `rank` is not in 1 to min(out, in).
        """
        largest = min(weight.shape)
        if not 1 <= rank <= largest:
            raise SparsifierError(f"the rank of a {list(weight.shape)} weight is in 1 to {largest}, got {rank}")
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.shape, weight.stride(), algorithm)
        _, name, factors = self._known.get(key, (weight, "", {}))
        if not factors or factors["V"].shape[0] < rank:
            shape = "x".join(map(str, weight.shape))
            name = name or f"{algorithm}-{shape}-{fingerprint.of_tensor(weight)}"
            found = self._read(name, rank)
            if found is None:
                found = _decompose(weight, min(largest, _rounded_up(rank)), algorithm)
                self._write(name, found)
            factors = found
            self._known[key] = (weight, name, factors)
        return factors["U"][:, :rank].contiguous(), factors["V"][:rank].contiguous()

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.safetensors"

    def _read(self, name: str, rank: int) -> dict[str, Tensor] | None:
        path = self._path(name)
        if path is None or not path.exists():
            return None
        try:
            factors = load_file(path)
            return factors if min(factors["U"].shape[1], factors["V"].shape[0]) >= rank else None
        except Exception:  # a damaged file is computed again
            return None

    def _write(self, name: str, factors: dict[str, Tensor]) -> None:
        path = self._path(name)
        if path is None:
            return
        with replacing(path) as temporary:
            save_file(factors, temporary)


@torch.no_grad()
def _decompose(weight: Tensor, rank: int, algorithm: Algorithm) -> dict[str, Tensor]:
    w = weight.float()
    if not bool(torch.isfinite(w).all()):
        raise DivergedError("a weight is NaN or beyond the range of float32: it has no singular value decomposition")
    if algorithm == "exact":
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[w.device] if w.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(w, min(*w.shape, rank + OVERSAMPLING), niter=ITERATIONS)
        vh = v.T
    return {"U": u[:, :rank].cpu().contiguous(), "V": (s[:rank, None] * vh[:rank]).cpu().contiguous()}


def _rounded_up(rank: int) -> int:
    """Rounds up to a power of two, at least 64, so that a slightly larger rank later is at hand."""
    return max(64, 1 << (rank - 1).bit_length())
