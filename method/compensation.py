"""Holds what is trained at the sites of a plan, and writes it into the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from resting.method.masks import TrainedMask, scaled
from resting.method.thresholds import ConstantBytes
from resting.sparsifier import (
    ACT,
    THRESHOLD,
    Decoder,
    Plan,
    Rule,
    Site,
    SparseProduct,
    SparsifierError,
    folded_bias,
)

Side = Literal["input", "output"]
Refined = Literal["no", "site", "channel", "both"]


@dataclass
class Compensation:
    """Holds named parameters and makes the layers of a plan read them.

    Attributes
    ----------
    parameters : dict of str to Parameter
        ``alpha/3.down`` [vectors, in], ``bias/3.down`` [out], ``threshold/3.q`` (the logarithm of a factor; scalar or
        [in]), ``channel/3.q`` [in] (that of a factor relative to the site's), ``shift/3.q`` [in], ``gain/3.q`` [in],
        ``update/3.q`` [out + in, rank] (two factors, one above the other).
    masked : list of Site
        Sites whose masks are trained through (`TrainedMask`); the others are left to automatic differentiation.
    smoothing : float
        Smoothing of those masks.
    """

    decoder: Decoder
    parameters: dict[str, nn.Parameter]
    masked: list[Site]
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        # Read now: later, other layers may stand in for the linear ones.
        of, total = self.decoder, self.decoder.elements
        self._share = {site: of.projection(site).out_features * of.share(site) / total for site in of.sites()}
        self._masks: dict[Site, TrainedMask] = {}
        self._constant = ConstantBytes()
        self._before: dict[Site, Tensor] = {}

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        sites: list[Site],
        plan: Plan,
        device: torch.device,
        side: Side = "input",
        vectors: int = 1,
        thresholds: Refined = "no",
        shift: bool = False,
        gains: bool = False,
        rank: int = 0,
        seed: int = 0,
        smoothing: float = 0.0,
        start: Mapping[Site, Tensor] | None = None,
    ) -> Compensation:
        """Begins at `plan`'s thresholds and, at `sites`, at zeros or `start` ([in]; [out] on the output side).

        Raises
        ------
        SparsifierError
            If masks are to be trained that are not of the form |x| > t.
        """
        parameters: dict[str, Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for site in sites:
            matrix = decoder.projection(site)
            width = matrix.in_features if side == "input" else matrix.out_features
            value = torch.zeros(width) if start is None or site not in start else start[site].float().cpu()
            if side == "input":
                parameters[f"alpha/{site}"] = torch.stack([value / vectors] * vectors)
            else:
                parameters[f"bias/{site}"] = value
        masked = masked_sites(plan) if thresholds != "no" or shift or gains or rank or smoothing else []
        if gains or rank:
            _check_no_low_rank(plan, masked)
        for site in masked:
            width, height = decoder.projection(site).in_features, decoder.projection(site).out_features
            if thresholds != "no":
                parameters[f"threshold/{site}"] = torch.zeros(width if thresholds == "channel" else ())
            if shift:
                parameters[f"shift/{site}"] = torch.zeros(width)
            if thresholds == "both":
                parameters[f"channel/{site}"] = torch.zeros(width)
            if gains:
                parameters[f"gain/{site}"] = torch.zeros(width)
            if rank:  # U begins at zero and V at random, so that both get a gradient from the second step on
                v = torch.randn(width, rank, generator=generator) / width**0.5
                parameters[f"update/{site}"] = torch.cat([torch.zeros(height, rank), v])
        trained = {name: nn.Parameter(value.clone().to(device)) for name, value in parameters.items()}
        return cls(decoder, trained, masked, smoothing)

    def of_kind(self, kind: str) -> dict[Site, nn.Parameter]:
        """Selects the parameters whose names begin with `kind`, by site."""
        named = ((name.split("/"), parameter) for name, parameter in self.parameters.items())
        return {Site.parse(site): parameter for (found, site), parameter in named if found == kind}

    def attach(self, plan: Plan, layers: Mapping[Site, SparseProduct]) -> None:
        """Makes `layers`, in which `plan` is applied, read the parameters; it is called before every forward."""
        resting = {site: alpha.sum(0) for site, alpha in self.of_kind("alpha").items()}
        for site, bias in self.of_kind("bias").items():
            layers[site].offset = bias
        kinds = ("threshold", "channel", "shift", "gain")
        deltas, channels, shifts, gains = (self.of_kind(kind) for kind in kinds)
        for site in self.masked:
            layer, shift = layers[site], shifts.get(site)
            if site not in self._masks or self._masks[site].rule is not plan.rules[site]:
                delta = deltas.get(site, torch.zeros((), device=layer.linear.weight.device))
                both = (delta, channels[site]) if site in channels else (delta,)
                more = self._share[site], self.smoothing, shift, gains.get(site)
                self._masks[site] = TrainedMask(plan.rules[site], both, *more)
            layer.mask = self._masks[site]
            if shift is not None:  # what is taken from an input comes back where it rests
                resting[site] = shift + resting.get(site, 0.0)
        for site, update in self.of_kind("update").items():
            u, v = _factors(update, self.decoder, site)
            layers[site].update = u, v.T
        for site, values in resting.items():
            layers[site].spontaneous = values

    def _refined(self) -> dict[Site, TrainedMask]:
        return {site: self._masks[site] for site in self.of_kind("threshold")}

    def before_step(self) -> None:
        """Projects the gradients of thresholds; it is called once the gradients are there."""
        if masks := self._refined():
            self._constant.project(masks)
            self._before = {site: mask.delta.detach().clone() for site, mask in masks.items()}

    def after_step(self) -> None:
        """Gives back, by all thresholds together, the bytes that the step changed."""
        if masks := self._refined():
            self._constant.give_back(masks, self._before)

    def counters(self) -> dict[str, float]:
        """Gives what a checkpoint keeps beside the parameters."""
        return asdict(self._constant)

    def restore(self, counters: Mapping[str, float]) -> None:
        """Takes up the counters of a checkpoint."""
        self._constant = replace(self._constant, **counters)

    def compensated(self, plan: Plan, values: Mapping[str, Tensor]) -> Plan:
        """Writes `values` of the parameters into the rules of `plan`, as thresholds, shifts, biases and weights."""
        rules = dict(plan.rules)
        for name, value in values.items():
            kind, site = name.split("/")
            at = Site.parse(site)
            rule = rules.get(at, Rule())
            if kind in ("gain", "update"):
                continue
            if kind in ("threshold", "channel"):
                rules[at] = scaled(rule, value)
                continue
            if kind == "shift":
                rule = replace(rule, shift=value.detach().float().cpu())
            if kind == "bias":
                bias = value.detach().float().cpu()
            else:
                bias = folded_bias(self.decoder, at, value.sum(0) if kind == "alpha" else value, rule.weight)
            rules[at] = replace(rule, bias=bias if rule.bias is None else rule.bias + bias)
        return replace(plan, rules=self._with_weights(rules, values))

    def _with_weights(self, rules: dict[Site, Rule], values: Mapping[str, Tensor]) -> dict[Site, Rule]:
        """Folds updates and gains into the weights of sparse tokens: ``(W + U V) diag(1 + gain)``.

        Biases are made before: alpha passes neither.
        """
        for site in self.masked:
            update, gain = values.get(f"update/{site}"), values.get(f"gain/{site}")
            if update is None and gain is None:
                continue
            held = self.decoder.projection(site).weight.detach()
            weight = rules[site].weight
            weight = held.float() if weight is None else weight.to(held).float()
            if update is not None:
                u, v = _factors(update.detach().float(), self.decoder, site)
                weight = weight + u @ v.T
            if gain is not None:
                weight = weight * (1 + gain.detach().float())
            rules[site] = replace(rules[site], weight=weight.to(held.dtype).cpu())
        return rules


def _factors(update: Tensor, decoder: Decoder, site: Site) -> tuple[Tensor, Tensor]:
    """Gives U [out, rank] and the transpose of V, [in, rank]."""
    matrix = decoder.projection(site)
    u, v = update.split([matrix.out_features, matrix.in_features])
    return u, v


def _check_no_low_rank(plan: Plan, sites: list[Site]) -> None:
    if low := next((site for site in sites if plan.rules[site].low_rank is not None), None):
        raise SparsifierError(
            f"gains and updates are folded into the weights; {plan.method} has a low-rank part beside them at {low}"
        )


def masked_sites(plan: Plan) -> list[Site]:
    """Lists the sites whose masks can be trained, and refuses masks that are not of the form |x| > t."""
    masked = [site for site, rule in plan.rules.items() if not rule.masks_nothing]
    if plan.neurons:
        raise SparsifierError(f"masks are trained at linear layers; {plan.method} masks neurons")
    if any(site.role == ACT for site in masked):
        raise SparsifierError(f"masks are trained at linear layers; {plan.method} masks the activated gate")
    for site in masked:
        rule = plan.rules[site]
        if rule.topk is not None or rule.shifts:
            raise SparsifierError(f"{plan.method} has no threshold on |x| at {site} that could be trained")
        if rule.mask != THRESHOLD or rule.rescale:
            what = "rescaled inputs" if rule.rescale else f"the mask {rule.mask!r}"
            raise SparsifierError(f"masks are trained by their threshold alone; {plan.method} has {what} at {site}")
    return masked
