"""Runs a transform with the residual stream as it was: what is rotated is what the norms give."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from resting.sparsifier import fingerprint
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import PlanError
from resting.sparsifier.sites import Site
from resting.sparsifier.transform.checking import check
from resting.sparsifier.transform.heads import Heads
from resting.sparsifier.transform.structure import KINDS, NormBefore, readers
from resting.sparsifier.transform.swapping import Swapped, high, like
from resting.sparsifier.transform.transform import Transform

_active: WeakKeyDictionary[nn.Module, Transform] = WeakKeyDictionary()


def active(model: nn.Module) -> Transform | None:
    """Gives the transform that is on `model` at present."""
    return _active.get(model)


@contextmanager
def explicit(transform: Transform, model: Any, decoder: Decoder | None = None) -> Iterator[None]:
    """Rewrites `model` inside the ``with`` block and leaves its residual stream as it was.

    Norms give ``n Q``, and the matrices that read it are ``W diag(gamma) Q``. So the hidden states at the end, and all
    that is done with them, stay those of the dense model. Afterwards the model is what it was bit for bit, also after
    an exception. Its fingerprint stays the same, and its state is shown as the dense one's.

    Raises
    ------
    PlanError
        If a transform is on the model already, or this one is of other shapes.
    UnsupportedModelError
        If the model would compute something else; the message names the block.
    """
    decoder = decoder or Decoder.of(model)
    if (other := active(model)) is not None:
        raise PlanError(f"the transform {other.name} is on this model already: leave its `with` block first")
    transform.check(decoder)
    norms = check(transform, model, decoder).norms
    with rewriting(transform, model) as swapped:
        for block in range(decoder.blocks):
            for kind in KINDS if transform.folded else ():
                norm, sites = norms[block, kind], readers(decoder, block, kind)
                rotation = transform.rotation(sites[0])
                fold(swapped, decoder, sites, norm, rotation)
                if rotation is not None:
                    swapped.times(norm.module, rotation)
            if transform.heads:
                rotate_heads(swapped, decoder, block, transform.heads[block])
        _active[model] = transform
        swapped.finish(model)
        yield


@contextmanager
def rewriting(transform: Transform, model: Any) -> Iterator[Swapped]:
    """Opens `model` for rewriting without gradients, until `Swapped.finish`, and puts all back at the end."""
    with ExitStack() as stack:
        stack.callback(_active.pop, model, None)
        yield Swapped(stack, fingerprint.of_model(model))


@torch.no_grad()
def fold(swapped: Swapped, decoder: Decoder, sites: list[Site], norm: NormBefore, rotation: Tensor | None) -> None:
    """Folds a norm into the matrices at `sites` that read it, and rotates their inputs."""
    gamma = norm.gamma
    swapped.parameter(norm.module, "weight", norm.neutral)
    for site in sites:
        matrix = decoder.projection(site)
        weight = high(matrix.weight) * gamma
        swapped.matrix(matrix, weight if rotation is None else weight @ like(rotation, weight))


@torch.no_grad()
def rotate_heads(swapped: Swapped, decoder: Decoder, block: int, turn: Tensor) -> None:
    """Rotates the heads of values of `block`, and the matrix that reads what attention makes of them."""
    heads = Heads.of(decoder, block)
    v, o = (decoder.projection(Site(block, role)) for role in ("v", "o"))
    turn = like(turn, v.weight)
    swapped.matrix(v, heads.of_values(high(v.weight), turn))
    if v.bias is not None:
        swapped.parameter(v.module, "bias", heads.of_values(high(v.bias), turn))
    swapped.matrix(o, heads.of_outputs(high(o.weight), turn))


def dense_bias(transform: Transform, decoder: Decoder, site: Site, bias: Tensor) -> Tensor:
    """Gives a bias [out] of the rewritten layer at `site` as the layer has it in the model as it was.

    Outputs are those of the dense model, but for the values where heads are rotated.
    """
    if site.role != "v" or not transform.heads:
        return bias
    turn = transform.heads[site.block].to(bias)
    return Heads.of(decoder, site.block).of_values(bias, turn.mT)
