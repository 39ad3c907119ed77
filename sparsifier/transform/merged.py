"""Runs a transform with a rotated residual stream, so that matrices, norms and blocks stay plain modules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site
from resting.sparsifier.transform.checking import check, writers
from resting.sparsifier.transform.explicit import explicit, fold, rewriting, rotate_heads
from resting.sparsifier.transform.structure import KINDS, NormBefore, readers
from resting.sparsifier.transform.swapping import Swapped, high, like
from resting.sparsifier.transform.transform import Transform


@contextmanager
def merged(transform: Transform, model: Any, decoder: Decoder | None = None) -> Iterator[None]:
    """Rewrites `model` inside the ``with`` block and rotates its residual stream, ``r' = r Q``.

    Embedding and output layer are rotated too, and share no weight inside. Adapters are hooks: behind blocks, and
    where attention and MLP of a block have two rotations, behind the norm before the MLP. Rules of a plan are to go
    through `merged_rules`. Hidden states are rotated, logits are not.

    Raises
    ------
    PlanError, UnsupportedModelError
        As `explicit`, or if embedding, last norm or output layer are of another form.
    """
    decoder = decoder or Decoder.of(model)
    if not transform.rotations:  # nothing to rotate: both forms are one
        with explicit(transform, model, decoder):
            yield
        return
    transform.check(decoder)
    found = check(transform, model, decoder, ends=True)
    assert found.last is not None
    with rewriting(transform, model) as swapped:
        for block in range(decoder.blocks):
            _rotate_block(transform, swapped, decoder, block, found.norms)
            if transform.heads:
                rotate_heads(swapped, decoder, block, transform.heads[block])
        _rotate_ends(transform, swapped, model, found.last)
        swapped.finish(model)
        yield


@torch.no_grad()
def _rotate_block(
    transform: Transform,
    swapped: Swapped,
    decoder: Decoder,
    block: int,
    norms: Mapping[tuple[int, str], NormBefore],
) -> None:
    here, inside = transform.attention[block], transform.mlp[block]
    rotations = [rotation.double() for rotation in transform.rotations]
    for kind in KINDS:
        sites = readers(decoder, block, kind)
        fold(swapped, decoder, sites, norms[block, kind], transform.rotation(sites[0]))
    for site in writers(decoder, block):
        matrix = decoder.projection(site)
        rotation = like(transform.rotations[here], matrix.weight)
        swapped.matrix(matrix, rotation.T @ high(matrix.weight))
        if matrix.bias is not None:
            swapped.parameter(matrix.module, "bias", high(matrix.bias) @ rotation)
    if here != inside:
        swapped.times(norms[block, "mlp"].module, rotations[here].T @ rotations[inside])
    if block + 1 < decoder.blocks and here != (after := transform.attention[block + 1]):
        swapped.times(decoder.layers[block], rotations[here].T @ rotations[after])


@torch.no_grad()
def _rotate_ends(transform: Transform, swapped: Swapped, model: Any, last: NormBefore) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    first, end = (like(transform.rotations[i[0]], head.weight) for i in (transform.attention, transform.attention[-1:]))
    swapped.parameter(embedding, "weight", high(embedding.weight) @ first)
    # Where they were one parameter, this is the first of the two to hold it still.
    swapped.parameter(head, "weight", (high(head.weight) * last.gamma) @ end)
    swapped.parameter(last.module, "weight", last.neutral)


def merged_rules(transform: Transform, rules: Mapping[Site, Rule]) -> dict[Site, Rule]:
    """Rotates what rules put into the residual stream, at o and down, for the merged form."""
    return {site: _merged_rule(transform, site, rule) for site, rule in rules.items()}


def _merged_rule(transform: Transform, site: Site, rule: Rule) -> Rule:
    if site.role not in ("o", "down") or not transform.rotations:
        return rule
    rotation = transform.rotations[transform.attention[site.block]]
    changed: dict[str, Any] = {}
    if rule.bias is not None:
        changed["bias"] = rule.bias @ like(rotation, rule.bias).to(rule.bias.dtype)
    if rule.low_rank is not None:
        u, v = rule.low_rank
        changed["low_rank"] = (like(rotation, u).to(u.dtype).T @ u, v)
    weight = getattr(rule, "weight", None)  # in place of the matrix
    if weight is not None:
        changed["weight"] = like(rotation, weight).to(weight.dtype).T @ weight
    return replace(rule, **changed)
