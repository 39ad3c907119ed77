"""Defines the modules that stand in for linear layers and activations under a plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from resting.sparsifier.fused_masking import counted_unmasked, masked_and_counted
from resting.sparsifier.masking import Masking
from resting.sparsifier.meter import Meter, Share
from resting.sparsifier.policy import Selection
from resting.sparsifier.rule import Rule
from resting.sparsifier.sites import Site


class Tokens(Protocol):
    """Tells the sparse tokens of what is running: a `TokenTracker` of a forward, or that of one expert's call."""

    @property
    def selection(self) -> Selection:
        """Gives the sparse tokens."""
        ...


class SharedInput:
    """Computes the kept input of sites that read one tensor through one mask, once per forward."""

    def __init__(self, rule: Rule, meter: Meter | None, readers: int = 0) -> None:
        self.rule = rule
        self.meter = meter
        self.readers = readers
        self._masks_nothing = rule.masks_nothing
        self._masking = Masking(rule)
        self._x: Tensor | None = None
        self._version = 0
        self._selection: Selection | None = None
        self._kept: Tensor | None = None
        self._counts: Tensor | None = None
        self._share: Share | None = None
        self._reads = 0

    def same_mask(self, rule: Rule) -> bool:
        """Tells whether `rule` masks as this one does, whatever else it has; a subclass masks in a way of its own."""
        if type(rule) is not Rule or type(self.rule) is not Rule:
            return rule is self.rule
        return self.rule.same_mask(rule)

    def read(self, x: Tensor, site: Site, selection: Selection) -> Tensor:
        """Gives the kept input at `site`, and counts it for the meter."""
        counts = self.meter is not None and selection.counted
        if self._masks_nothing and not counts:
            return x
        version = 0 if x.is_inference() else x._version  # inference tensors have none, and are not written to
        is_known = self._x is x and self._version == version and self._selection is selection
        if not is_known or self._kept is None:
            self._x, self._version, self._selection, self._reads, self._share = x, version, selection, 0, None
            if self._masks_nothing:
                wanted = self.meter is not None and self.meter.wants(site)
                self._kept, self._counts = x, counted_unmasked(x, selection) if wanted else None
            else:
                self._kept, self._counts = masked_and_counted(self._masking, x, selection, counts)
        kept = self._kept
        if counts and self.meter is not None and self._masks_nothing:
            self._share = self.meter.look(site, kept, selection, self._share, self._counts)
        elif counts and self.meter is not None:
            self._share = self.meter.record(site, kept, selection, self._share, self._counts)
        self._reads += 1
        if self._reads == self.readers:
            self._x = self._kept = self._counts = None  # the last reader has it: nothing is kept alive between forwards
        return kept


_BLANK = vars(nn.Module())
_EMPTY = {name: type(held) for name, held in _BLANK.items() if isinstance(held, dict | set)}
_SETTINGS = {name: value for name, value in _BLANK.items() if name not in _EMPTY}


class StandIn(nn.Module):
    """Stands for a module inside the model, and is not seen in its state: that is saved and loaded as the dense one's.

    Attributes
    ----------
    stands_for : str
        Its attribute that holds the module.
    """

    stands_for: ClassVar[str]

    def __init__(self) -> None:
        vars(self).update(_SETTINGS)  # what `nn.Module` does, in half the time: a plan has hundreds
        vars(self).update({name: kind() for name, kind in _EMPTY.items()})

    @property
    def dense(self) -> nn.Module:
        """Gives the module that it stands for."""
        return getattr(self, self.stands_for)

    def take(self, module: nn.Module, **held: Any) -> None:
        """Takes the module that it stands for, in its mode, and what else it holds."""
        self._modules[self.stands_for] = module
        vars(self).update(held, training=module.training)  # `setattr` is much slower

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Gives the state of the module that it stands for, under the names that has in the dense model."""
        return self.dense.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # What is loaded has the names of the dense model.
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}{self.stands_for}.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)


class SparseProduct:
    """Computes a product with its resting inputs set to zero, after the definition.

    Attributes
    ----------
    spontaneous : Tensor [in], optional
        Input-independent activations added to the kept input of sparse tokens, S(x) + alpha (SPON); only in
        training, a fitted plan holds them as ``bias = W alpha``.
    offset : Tensor [out], optional
        Added to the output of sparse tokens; only in training, a fitted plan holds it as `bias`.
    update : (Tensor [out, r], Tensor [r, in]), optional
        Two factors whose product is added to the weights of sparse tokens, without the spontaneous activations; only
        in training, a fitted plan holds the sum as `weight`.
    mask : callable, optional
        From input to kept input, in place of the rule's mask; only in training, a fitted plan holds thresholds.
    """

    linear: Any
    """The layer, or the matrix of an expert."""
    site: Site
    rule: Rule
    shared: SharedInput
    spontaneous: Tensor | None
    offset: Tensor | None
    update: tuple[Tensor, Tensor] | None
    mask: Callable[[Tensor], Tensor] | None
    _bias: Tensor | None
    _weight: Tensor | None
    _factors: tuple[Tensor, Tensor] | None

    def prepare(self, site: Site, rule: Rule, shared: SharedInput, weight: Tensor) -> None:
        """Takes the rule at `site`, its vectors as `weight` has its numbers."""
        vars(self).update(
            site=site,
            rule=rule,
            shared=shared,
            spontaneous=None,
            offset=None,
            update=None,
            mask=None,
            _bias=None if rule.bias is None else rule.bias.to(weight),
            _weight=None if rule.weight is None else rule.weight.to(weight),
            _factors=None if rule.low_rank is None else tuple(f.to(weight) for f in rule.low_rank),
        )

    def product(self, dense: Callable[[Tensor], Tensor], x: Tensor, selection: Selection) -> Tensor:
        """Computes what stands in for ``dense(x)``."""
        masked = self.shared.read(x, self.site, selection) if self.mask is None else self._trained(x, selection)
        alpha = self.spontaneous
        kept = masked if alpha is None else selection.add(masked, alpha.to(masked.dtype))
        y = dense(kept) if self._weight is None else selection.by_kind(kept, self._replaced, dense)
        if self._factors is not None:
            u, v = self._factors
            y = y + ((x - masked) @ v.T) @ u.T  # U V x + (W - U V) x_kept, without a second copy of W
        if self.update is not None:
            y = y + selection.by_kind(masked, self._updated, lambda x: y.new_zeros(*x.shape[:-1], y.shape[-1]))
        if self._bias is not None:
            y = selection.add(y, self._bias)
        if self.offset is not None:
            y = selection.add(y, self.offset.to(y.dtype))
        return y

    def _replaced(self, x: Tensor) -> Tensor:
        """Computes the product with the weights of sparse tokens, and the layer's own bias."""
        assert self._weight is not None
        return F.linear(x, self._weight, self.linear.bias)

    def _updated(self, x: Tensor) -> Tensor:
        """Computes what the update of the weights adds."""
        assert self.update is not None
        u, v = (factor.to(x.dtype) for factor in self.update)
        return F.linear(F.linear(x, v), u)

    def _trained(self, x: Tensor, selection: Selection) -> Tensor:
        assert self.mask is not None
        kept = selection.restore_dense(self.mask(x), x)
        if self.shared.meter is not None and selection.counted:
            self.shared.meter.record(self.site, kept, selection)
        return kept


class SparseLinear(StandIn, SparseProduct):
    """Runs a linear layer as a `SparseProduct`.

    Attributes
    ----------
    linear : nn.Module
        The layer it stands for, called as it is.
    """

    stands_for = "linear"
    tokens: Tokens

    def __init__(self, linear: Any, site: Site, rule: Rule, tokens: Tokens, shared: SharedInput) -> None:
        super().__init__()
        self.take(linear, tokens=tokens)
        self.prepare(site, rule, shared, linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.linear, x, self.tokens.selection)


class SparseActivation(StandIn):
    """Runs the activation of the gate and sets its small values to zero (CATS, CHESS)."""

    stands_for = "activation"
    activation: Callable[[Tensor], Tensor]
    site: Site
    tokens: Tokens
    shared: SharedInput

    def __init__(self, activation: nn.Module, site: Site, tokens: Tokens, shared: SharedInput) -> None:
        super().__init__()
        self.take(activation, site=site, tokens=tokens, shared=shared)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared.read(self.activation(x), self.site, self.tokens.selection)
