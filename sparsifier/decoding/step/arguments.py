"""Tells which calls of a model a fast step of one token can stand for: what else they ask is without effect."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HANDLED = {"input_ids", "attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache"}
HANDLED |= {"logits_to_keep", "return_dict"}
OUTPUTS = ("output_attentions", "output_hidden_states", "output_router_logits")
ATTENTION = {"eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"}
"""Ways to compute attention that give, up to rounding, what the formula gives."""
PLACES = ("position_ids", "cache_position")


class Arguments:
    """Reads the arguments of calls of a model's `forward`.

    Parameters
    ----------
    forward : callable
        The model's own.
    config : PretrainedConfig
    """

    def __init__(self, forward: Callable[..., Any], config: Any) -> None:
        parameters = inspect.signature(forward).parameters.values()
        named = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._names = [p.name for p in named]
        self._not_none = {p.name for p in named if p.default not in (None, p.empty)}
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        self._configs = (config,) if text is config else (config, text)
        self._text = text

    def named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Gives all arguments by name; None where `forward` will refuse them."""
        if not args:
            return kwargs
        given = dict(zip(self._names, args))
        if len(args) > len(self._names) or not given.keys().isdisjoint(kwargs):
            return None
        return given | kwargs

    def ask_for_a_step(self, given: dict[str, Any]) -> bool:
        """Tells whether a call asks for the logits of one token after a cache, and nothing else.

        What a mask and positions hold is not looked at.
        """
        for name, value in given.items():
            if name in HANDLED:
                continue
            # An output that the config asks for is asked for.
            if value is not None and not (value is False and name in OUTPUTS):
                return False
            if value is None and name in self._not_none:
                return False
        ids, use_cache, keep = given.get("input_ids"), given.get("use_cache"), given.get("logits_to_keep", 0)
        if not isinstance(ids, Tensor) or ids.shape != (1, 1) or ids.dtype != torch.int64:
            return False
        if type(keep) is not int or keep not in (0, 1):
            return False
        if not (getattr(self._text, "use_cache", True) if use_cache is None else use_cache is True):
            return False
        if self._text._attn_implementation not in ATTENTION:
            return False
        return not any(getattr(config, name, False) for config in self._configs for name in OUTPUTS)

    def wants_tuple(self, given: dict[str, Any]) -> bool:
        """Tells whether the caller wants a tuple in place of a class with names."""
        return_dict = given.get("return_dict")
        return not (getattr(self._configs[0], "return_dict", True) if return_dict is None else return_dict)


def shapes_fit(given: dict[str, Any], past: int, device: torch.device) -> bool:
    """Tells whether mask and positions have the shapes of one token after `past` others."""
    mask = given.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.shape == (1, past + 1) and mask.device == device):
        return False
    for name in PLACES:
        place = given.get(name)
        if place is not None and not (
            isinstance(place, Tensor)
            and place.shape == ((1, 1) if name == "position_ids" else (1,))
            and place.device == device
            and not place.is_floating_point()
        ):
            return False
    return True


def contents_fit(given: dict[str, Any], past: int) -> bool:
    """Tells whether the mask hides nothing and the positions are `past`; waits for a GPU to say so."""
    mask = given.get("attention_mask")
    if mask is not None and not mask.all():
        return False
    return all(given.get(name) is None or given[name].item() == past for name in PLACES)


class LateCheck:
    """Looks at what masks and positions hold without waiting for a GPU: what it finds is known a call later.

    One flag on the device falls for good at the first call whose contents do not fit, and is copied to the host again
    and again: whenever it is looked at, it is too early or right.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        with torch.inference_mode(False):
            self._fits = torch.ones((), dtype=torch.bool, device=device)
            self._copy = torch.ones((), dtype=torch.bool, pin_memory=device.type == "cuda")
        self._seen = self._copy.numpy()

    def add(self, given: dict[str, Any], past: int) -> None:
        """Looks at the arguments of one call."""
        mask = given.get("attention_mask")
        fits = [] if mask is None else [mask.all()]
        fits += [given[name].view(()) == past for name in PLACES if given.get(name) is not None]
        for fit in fits:
            self._fits.logical_and_(fit)
        if fits:
            self._copy.copy_(self._fits, non_blocking=True)

    def has_failed(self) -> bool:
        """Tells whether a call was found whose contents do not fit; a call just before may not be known yet."""
        return not self._seen

    def wait(self) -> None:
        """Waits until all calls are known."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def reset(self) -> None:
        """Forgets what was found."""
        self.wait()
        self._fits.fill_(True)
        self._copy.fill_(True)
