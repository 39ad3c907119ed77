"""Tries, block by block in float32, whether a model computes the same after a rewriting of its kind.

Cheap rewritings of the same kind stand for the real ones: a reflection for a rotation. What holds for one orthogonal
matrix that mixes all channels holds for all of them.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from resting.sparsifier import fingerprint
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import UnsupportedModelError
from resting.sparsifier.evaluating import evaluating
from resting.sparsifier.projection import Projection
from resting.sparsifier.sites import Site
from resting.sparsifier.transform.heads import Heads
from resting.sparsifier.transform.structure import KINDS, TOLERANCE, NormBefore, Structure, first, off, readers
from resting.sparsifier.transform.transform import Transform

WHY = {
    "fold": "something else than its matrices reads what its norms give",
    "rotate": "a norm or something else of each channel's own acts on the residual stream or on what is added to it",
    "heads": "something stands between the values and the output matrix of its attention",
}
_tried: WeakKeyDictionary[nn.Module, tuple[str, Checked]] = WeakKeyDictionary()


class Checked:
    """Holds the norms of a model, and what was tried on it and held.

    Attributes
    ----------
    norms : dict of (int, str) to NormBefore
        By block and kind.
    last : NormBefore, optional
        The norm after the last block.
    """

    def __init__(self) -> None:
        self.norms: dict[tuple[int, str], NormBefore] = {}
        self.last: NormBefore | None = None
        self.held: set[str] = set()


def check(transform: Transform, model: nn.Module, decoder: Decoder, ends: bool = False) -> Checked:
    """Makes sure that `model` can be rewritten as `transform` says.

    Each kind of rewriting is tried once on a model with these weights.

    Parameters
    ----------
    ends : bool
        Find the last norm as well.

    Raises
    ------
    UnsupportedModelError
        If it cannot; the message names the block.
    """
    digest = fingerprint.of_model(model)
    if model not in _tried or _tried[model][0] != digest:
        _tried[model] = digest, Checked()
    known = _tried[model][1]
    wanted = {"fold": transform.folded, "rotate": bool(transform.rotations), "heads": bool(transform.heads)}
    wanted_now = [kind for kind, is_wanted in wanted.items() if is_wanted and kind not in known.held]
    if not wanted_now and (known.last is not None or not ends):
        return known
    if transform.folded and (mixed := [i for i, found in enumerate(decoder.found) if any(p for p, _ in found.slots)]):
        raise UnsupportedModelError(f"block {mixed[0]} has experts: {transform.name} of what they read is not known")
    structure = Structure.of(model, decoder)
    if ends:
        known.last = structure.last_norm()
        structure.check_ends(model, known.last)
    with torch.no_grad(), evaluating(model):
        for block in range(decoder.blocks):
            if transform.folded:
                for kind in KINDS:
                    known.norms[block, kind] = structure.norm(decoder, block, kind)
            trial = Trial(decoder, block, structure, known.norms)
            for kind in wanted_now:
                error = trial.error(kind)
                if not error <= TOLERANCE:
                    raise UnsupportedModelError(
                        f"block {block}, {type(decoder.layers[block]).__name__}, does not compute the same under "
                        f"{transform.name}: off by {error:.1e} of the largest number, because {WHY[kind]}"
                    )
    known.held.update(wanted_now)
    return known


class Trial:
    """Rewrites one block in float32 and compares it with what it was."""

    def __init__(
        self, decoder: Decoder, block: int, structure: Structure, norms: dict[tuple[int, str], NormBefore]
    ) -> None:
        self.decoder, self.block, self.norms = decoder, block, norms
        self.layer: Any = decoder.layers[block]
        self.numbers = {name: _float(p.detach()) for name, p in self.layer.named_parameters()}
        self._names = {id(p): name for name, p in self.layer.named_parameters(remove_duplicate=False)}
        call = structure.calls[block]
        self._args, self._kwargs = _float(call.args[1:]), _float(call.kwargs)
        hidden = call.args[0]
        generator = torch.Generator().manual_seed(block)
        self.x = torch.randn(hidden.shape, generator=generator).to(hidden.device)
        self.given = self._run(self.numbers, self.x)
        self._reflection = torch.randn(hidden.shape[-1], generator=generator).to(hidden.device)

    def error(self, kind: str) -> float:
        """Measures how far off what the block adds to the residual stream is."""
        try:
            if kind == "rotate":
                found = self._reflect(self._run(self._rotated(), self._reflect(self.x)))
            else:
                found = self._run(self._folded() if kind == "fold" else self._with_heads(), self.x)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(f"block {self.block} cannot be tried in float32: {error}") from error
        return max(off(found, self.given), off(found - self.x, self.given - self.x) / 4)

    def _run(self, numbers: dict[str, Tensor], x: Tensor) -> Tensor:
        return first(functional_call(self.layer, numbers, (x, *self._args), self._kwargs))

    def _folded(self) -> dict[str, Tensor]:
        numbers = dict(self.numbers)
        for kind in KINDS:
            norm = self.norms[self.block, kind]
            numbers[self._names[id(norm.module.weight)]] = norm.neutral.float()
            for matrix in map(self.decoder.projection, readers(self.decoder, self.block, kind)):
                self._put(numbers, matrix, self._weight(numbers, matrix) * norm.gamma.float())
        return numbers

    def _rotated(self) -> dict[str, Tensor]:
        """Reflects the residual stream: what is read of it, and what is added to it."""
        numbers = self._folded()
        sites = [s for kind in KINDS for s in readers(self.decoder, self.block, kind)]
        for matrix in map(self.decoder.projection, sites):
            self._put(numbers, matrix, self._reflect(self._weight(numbers, matrix)))
        for matrix in map(self.decoder.projection, writers(self.decoder, self.block)):
            self._put(numbers, matrix, self._reflect(self._weight(numbers, matrix).T).T)
            if matrix.bias is not None:
                name = self._names[id(matrix.bias)]
                numbers[name] = self._reflect(numbers[name])
        return numbers

    def _with_heads(self) -> dict[str, Tensor]:
        """Reflects every head of values, each by a reflection of its own."""
        numbers, heads = dict(self.numbers), Heads.of(self.decoder, self.block)
        generator = torch.Generator().manual_seed(1)
        axes = torch.randn(heads.groups, heads.size, generator=generator).to(self.x.device)
        axes = axes / axes.norm(dim=-1, keepdim=True)
        turn = torch.eye(heads.size, device=self.x.device) - 2 * axes[:, :, None] * axes[:, None, :]
        v, o = (self.decoder.projection(Site(self.block, role)) for role in ("v", "o"))
        self._put(numbers, v, heads.of_values(self._weight(numbers, v), turn))
        if v.bias is not None:
            name = self._names[id(v.bias)]
            numbers[name] = heads.of_values(numbers[name], turn)
        self._put(numbers, o, heads.of_outputs(self._weight(numbers, o), turn))
        return numbers

    def _reflect(self, rows: Tensor) -> Tensor:
        axis = self._reflection / self._reflection.norm()
        return rows - 2 * (rows @ axis)[..., None] * axis

    def _weight(self, numbers: dict[str, Tensor], matrix: Projection) -> Tensor:
        weight = numbers[self._names[id(getattr(matrix.module, matrix.name))]]
        return weight.T if matrix.transposed else weight

    def _put(self, numbers: dict[str, Tensor], matrix: Projection, weight: Tensor) -> None:
        name = self._names[id(getattr(matrix.module, matrix.name))]
        numbers[name] = weight.T if matrix.transposed else weight


def writers(decoder: Decoder, block: int) -> list[Site]:
    """Lists the sites of `block` whose outputs are added to the residual stream."""
    return [site for site in decoder.sites() if site.block == block and site.role in ("o", "down")]


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_float(one) for one in value)
    if isinstance(value, dict):
        return {name: _float(one) for name, one in value.items()}
    return value
