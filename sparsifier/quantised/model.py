"""Puts the block linears of a model, and its output layer where a format says so, into codes, and keeps them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import PlanError, SparsifierError
from resting.sparsifier.plan import Plan
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.nearest import quantised
from resting.sparsifier.quantised.weight import QuantisedWeight
from resting.sparsifier.sites import Site
from resting.sparsifier.weights import check_weights


class Stored(NamedTuple):
    """Holds what a model's weights are stored as.

    Attributes
    ----------
    format : Format
    codes : dict of Site to QuantisedWeight
        Of the block linears.
    head : QuantisedWeight or None
        Of the output layer, where ``format.head``.
    """

    format: Format
    codes: Mapping[Site, QuantisedWeight]
    head: QuantisedWeight | None = None


_known: WeakKeyDictionary[nn.Module, Stored] = WeakKeyDictionary()


@torch.no_grad()
def quantise(model: nn.Module, format: Format) -> dict[Site, QuantisedWeight]:
    """Replaces every block linear of `model` by the numbers that its codes stand for.

    Embedding, norms, biases and routers stay as they are, and so does the output layer, unless the format says
    otherwise (``format.head``): one that shares its weights with the embedding gets a copy of its own then. Whatever is
    computed with the model is computed with the weights that a kernel reads: in float32 exactly, in a shorter dtype
    each rounded once more. The weights are written over, and cannot be had back.

    Parameters
    ----------
    model : nn.Module
    format : Format

    Returns
    -------
    dict of Site to QuantisedWeight
        The codes, which `codes_of` gives again.

    Raises
    ------
    SparsifierError
        If the model is quantised already, a group does not divide the outputs of one of its matrices, or codes are to
        make up for errors (`quantise_compensated`); no weight is changed then.
    """
    if format.compensated:
        raise SparsifierError(
            f"the nearest codes are not {format.name}: those are found on calibration text, by quantise_compensated"
        )
    decoder = Decoder.of(model)
    check_weights(decoder)
    check(model, decoder, format)
    _check_plain(model)
    found = {}
    for site in decoder.matrices:
        weight = decoder.projection(site).weight
        found[site] = quantised(weight, format)
        weight.copy_(found[site].dequantised().T)
    keep(model, format, found)
    return found


@torch.no_grad()
def take_codes(model: nn.Module, wide: nn.Module) -> None:
    """Puts the block linears of `model` into the codes of `wide`, the same model in float32.

    Codes of weights that were rounded to 16 bits before would be others.

    Raises
    ------
    SparsifierError
        If `model` is quantised already.
    """
    _check_plain(model)
    decoder, held = Decoder.of(model), _known[wide]
    for site, codes in held.codes.items():
        decoder.projection(site).weight.copy_(codes.dequantised().T)
    if held.head is not None:
        _own_head(model).weight.copy_(held.head.dequantised().T)
    _known[model] = held


def same_codes(model: nn.Module, copy: nn.Module) -> None:
    """Tells that `copy` has the weights of a model that `quantise` has written to; nothing of any other."""
    if model in _known:
        _known[copy] = _known[model]


@torch.no_grad()
def keep(model: nn.Module, format: Format, found: Mapping[Site, QuantisedWeight]) -> None:
    """Takes note of the codes that a model's block linears now stand for; `model` was plain before.

    The output layer is put into its nearest codes where the format asks for it.
    """
    _check_plain(model)
    head = None
    if format.head:
        linear = _own_head(model)
        head = quantised(linear.weight, format)
        linear.weight.copy_(head.dequantised().T)
    _known[model] = Stored(format, found, head)


def _own_head(model: Any) -> nn.Linear:
    """Gives the output layer; one that shares its weights with the embedding gets a copy of its own, and keeps it.

    Nothing ties them again, since the model's configuration says that they are not.
    """
    head: nn.Linear = model.get_output_embeddings()
    if head.weight is model.get_input_embeddings().weight:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
    return head


def _check_plain(model: nn.Module) -> None:
    if model in _known:
        raise SparsifierError(f"this model is in {_known[model].format.name} already: load its plain weights again")


def check(model: Any, decoder: Decoder, format: Format) -> None:
    """Refuses a format whose group does not divide the outputs of every matrix that is to be stored in it.

    Raises
    ------
    SparsifierError
        Also if the output layer is to be, and is no plain linear one.
    """
    outputs: dict[Any, int] = {site: decoder.projection(site).out_features for site in decoder.matrices}
    if format.head:
        head = getattr(model, "get_output_embeddings", lambda: None)()
        if type(head) is not nn.Linear:
            kind = "none" if head is None else type(head).__name__
            raise SparsifierError(
                f"{format.name} stores the output layer too, which is to be a plain linear one, and is {kind}; "
                f"allowed: {format._replace(head=False).name}"
            )
        outputs["the output layer"] = head.out_features
    for site, count in outputs.items():
        if count % format.group:
            widest = math.gcd(*outputs.values())
            groups = [group for group in (128, 64, 32, 16, 8) if widest % group == 0]
            fitting = [format._replace(group=group, zero=False, compensated=False).name for group in groups]
            raise SparsifierError(
                f"{format.name} has a scale for every {format.group} outputs, which does not divide the {count} of "
                f"{site}; allowed for this model: {', '.join(fitting) or f'a group that divides {widest}'}"
            )


def format_of(model: nn.Module) -> Format | None:
    """Gives the format that `quantise` put a model into; None of any other."""
    return _known[model].format if model in _known else None


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Refuses a plan under which a quantised model would be computed with other weights than its codes stand for.

    Raises
    ------
    PlanError
        If it rewrites the model, or brings weights of its own.
    """
    if (format := format_of(model)) is None:
        return
    if plan.transform is not None:
        raise PlanError(
            f"{plan.method} rewrites the model ({plan.transform.name}): its matrices would not be those stored as "
            f"{format.name}; allowed on quantised weights: methods that leave the weights as they are"
        )
    if (site := next((site for site, rule in plan.rules.items() if rule.weight is not None), None)) is not None:
        raise PlanError(
            f"{plan.method} replaces the weights at {site}, which are stored as {format.name}; allowed on quantised "
            "weights: methods that leave the weights as they are"
        )


def codes_of(model: nn.Module, decoder: Decoder | None = None) -> tuple[Format, Mapping[Site, QuantisedWeight]] | None:
    """Gives the format of a model that `quantise` has written to, and its codes; None of any other.

    Parameters
    ----------
    model : nn.Module
    decoder : Decoder, optional
        Of it; needed while other modules stand for its layers.

    Raises
    ------
    SparsifierError
        If a weight is not the one that its codes stand for any more.
    """
    if model not in _known:
        return None
    format, found, _ = _known[model]
    decoder = Decoder.of(model) if decoder is None else decoder
    for site, held in found.items():
        _check_same(held, decoder.projection(site).weight, f"at {site}")
    return format, found


def head_codes_of(model: Any) -> QuantisedWeight | None:
    """Gives the codes of the output layer of a model that `quantise` has put into a format with them; else None.

    Raises
    ------
    SparsifierError
        If its weights are not those that the codes stand for any more.
    """
    held = _known[model].head if model in _known else None
    if held is not None:
        _check_same(held, model.get_output_embeddings().weight, "of the output layer")
    return held


def _check_same(held: QuantisedWeight, weight: Tensor, where: str) -> None:
    if not torch.equal(held.dequantised().T.to(weight), weight):
        raise SparsifierError(f"the weights {where} were changed after they were stored as {held.format.name}")
