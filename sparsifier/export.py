"""Writes biases into the linear layers of a model, such that they survive a save and a load or none is made."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from resting.sparsifier.decoder import Decoder
from resting.sparsifier.errors import PlanError, UnsupportedModelError
from resting.sparsifier.projection import Projection, is_linear
from resting.sparsifier.sites import Site


@contextmanager
def with_biases(model: nn.Module, decoder: Decoder, biases: Mapping[Site, Tensor]) -> Iterator[None]:
    """Adds `biases` [out] to those of the linear layers at their sites, inside the ``with`` block.

    Where a layer had none, the model cannot be saved by itself.
    """
    with ExitStack() as stack:
        lost: list[Site] = []
        for site, bias in biases.items():
            linear = decoder.linear(site)
            stack.callback(setattr, linear, "bias", linear.bias)
            lost += [site] if linear.bias is None else []
            linear.bias = _with_bias(linear, bias, site)
        if lost:
            stack.enter_context(unsaved(model, lost[0]))
        yield


def _with_bias(linear: Any, bias: Tensor, site: Site) -> nn.Parameter:
    """Adds `bias` to that of `linear`, in the dtype of its weight."""
    total = bias.to(linear.weight) if linear.bias is None else linear.bias + bias.to(linear.weight)
    if not bool(torch.isfinite(total).all()):
        raise PlanError(f"the bias at {site} is beyond the range of {str(total.dtype)[6:]}")
    return nn.Parameter(total.detach(), requires_grad=False)


@contextmanager
def unsaved(model: nn.Module, site: Site) -> Iterator[None]:
    """Refuses `save_pretrained`, whose config would not say that there is a bias at `site`."""

    def refused(*args: Any, **kwargs: Any) -> None:
        raise PlanError(f"a load of what is saved here drops the bias at {site}: use plan.export(model, folder)")

    before = vars(model).get("save_pretrained")
    model.save_pretrained = refused  # type: ignore[assignment]
    try:
        yield
    finally:
        if before is None:
            del model.save_pretrained
        else:
            model.save_pretrained = before


@contextmanager
def storable(model: Any, layers: Iterable[str]) -> Iterator[None]:
    """Makes a config that has biases at `layers` the config of `model`, inside the ``with`` block.

    A config switches biases on for several layers at once (`attention_bias`: q, k, v and o); those that have none get
    zeros. Which setting does what is found out by building the model without memory.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    layers : iterable of str
        Names of linear layers that have a bias now, or will have.

    Raises
    ------
    UnsupportedModelError
        If no setting of the config gives one of `layers` a bias.
    """
    wanted = set(layers)
    if not wanted:
        yield
        return
    kind, config = type(model), model.config
    plain = _biases(_built(kind, config))
    on: list[str] = []
    for flag in _off(config) if wanted - plain else []:
        try:
            gained = _biases(_built(kind, _with(config, [flag]))) - plain
        except Exception:  # a config or a model that refuses the setting
            continue
        if gained & wanted:
            on.append(flag)
    changed = _with(config, on)
    built = _built(kind, changed)
    held = _biases(built)
    if missing := sorted(wanted - held):
        raise UnsupportedModelError(
            f"{kind.__name__} cannot be saved with a bias at {missing[0]}: no setting of its config gives that "
            "layer one, and a load would drop it"
        )
    with ExitStack() as stack:
        stack.callback(setattr, model, "config", config)
        model.config = changed  # a save writes into it
        for name in held:
            linear = model.get_submodule(name)
            if linear.bias is None:
                stack.callback(setattr, linear, "bias", None)
                linear.bias = nn.Parameter(
                    linear.weight.new_zeros(Projection.of(linear).out_features), requires_grad=False
                )
        if differing := sorted(model.state_dict().keys() ^ built.state_dict().keys()):
            raise UnsupportedModelError(
                f"{kind.__name__} cannot be saved with biases: what its config builds differs in {differing[0]}"
            )
        yield


def _off(config: Any) -> list[str]:
    """Lists the settings about biases that are off."""
    text = config.get_text_config()
    return [n for n in sorted(text.to_dict()) if "bias" in n and getattr(text, n, None) is False]


def _with(config: Any, on: list[str]) -> Any:
    """Copies `config`, with the settings `on` switched on."""
    changed = copy.deepcopy(config)
    for flag in on:
        setattr(changed.get_text_config(), flag, True)
    return changed


def _built(kind: type[nn.Module], config: Any) -> nn.Module:
    """Builds the model of `config` without memory, and without a random number."""
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        return kind(copy.deepcopy(config))


def _biases(model: nn.Module) -> set[str]:
    """Names the linear layers of `model` that have a bias."""
    return {name for name, m in model.named_modules() if is_linear(m) and m.bias is not None}
