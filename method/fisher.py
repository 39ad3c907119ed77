"""Computes the best constant in the Fisher metric, token by token and layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from resting.method.training import frozen
from resting.sparsifier import (
    CalibratedModel,
    Compensated,
    DivergedError,
    Plan,
    Site,
    SparsifierError,
    TokenTracker,
    check_own_weights,
    final_hidden,
    logits,
    masked,
)

CHUNK = 128
"""Tokens whose logits are in memory at a time."""


@dataclass
class FisherError(Compensated):
    r"""Adds the constant nearest to each layer's sparsification error, as far as the output distribution feels it.

    .. math:: bias = (E[H] + \rho \, \overline{diag} \, I)^{-1} \, E[H e(x)], \qquad e(x) = W (x - S(x)), \qquad
              H = E_{y \sim p}[g g^T], \quad g = \partial \log p(y) / \partial (W x)

    The stationarity condition ``E[W^T H (W alpha - e(X))] = 0`` of the KL loss (section 3, the theory of version 2),
    solved: H is the Fisher information of the output distribution, pulled back to the layer's output by one backward
    pass of the dense model over calibration text, with one label per token drawn from the model itself. With H the
    identity it is `MeanError`. Every layer is taken as the only one with an error, and every token's error on its own:
    that one constant acts on all tokens together, and one layer's error on the next, is left to training.

    Parameters
    ----------
    damping : float
        rho, in multiples of the mean diagonal entry.
    windows : int
        Calibration windows.
    seed : int
        Seed of the labels.
    """

    name: ClassVar[str] = "fisher-error"

    damping: float = 0.01
    windows: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.damping > 0:
            raise SparsifierError(f"damping must be above 0, got {self.damping}")
        if self.windows < 1:
            raise SparsifierError(f"windows must be at least 1, got {self.windows}")

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        base = self.inner.plan_for(calibrated)
        sites = calibrated.decoder.sites(self.sites)
        biases = fisher_bias(calibrated, base, sites, self.windows, self.damping, self.seed)
        return self.matched(calibrated, lambda plan: self.with_biases(plan, biases), start=base.nominal)


@dataclass
class _Sums:
    """Sums ``g g^T`` [out, out] and ``g (g e)`` [out] of one layer."""

    fisher: Tensor | float = 0.0
    error: Tensor | float = 0.0

    def add(self, g: Tensor, e: Tensor) -> None:
        """Counts the gradients `g` and errors `e` [tokens, out]."""
        self.fisher = self.fisher + g.T @ g
        self.error = self.error + g.T @ (g * e).sum(1)

    def solve(self, damping: float) -> Tensor:
        assert isinstance(self.fisher, Tensor)
        ridge = damping * self.fisher.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        return torch.linalg.solve(self.fisher + ridge * torch.eye(len(self.fisher)).double(), self.error)


def fisher_bias(
    calibrated: CalibratedModel, plan: Plan, sites: list[Site], windows: int = 8, damping: float = 0.01, seed: int = 0
) -> dict[Site, Tensor]:
    """Computes the biases [out] of `FisherError` for `sites`, in fp32 on the CPU."""
    decoder, model = calibrated.decoder, calibrated.model
    if calibrated.calibration.attention_mask is not None:
        raise SparsifierError("the Fisher metric needs calibration windows without padding")
    masks = {site for site, rule in plan.rules.items() if not rule.masks_nothing}
    unmasked = {site.role for site in sites} - {site.role for site in masks}
    if unmasked and plan.target > 0:
        raise SparsifierError(
            f"{plan.method} masks no input of {', '.join(sorted(unmasked))}: nothing is dropped there"
        )
    sites = [site for site in sites if site in masks]
    check_own_weights(plan, sites)
    text = calibrated.calibration.windows[:windows]
    tracker = TokenTracker(calibrated.calibration.statistics_policy_for(text))
    sums: dict[Site, _Sums] = {}
    seen: dict[Site, tuple[Tensor, Tensor]] = {}

    def watch(site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].detach()
            rule = plan.rules[site]
            dropped = x - masked(x, rule)
            error = nn.functional.linear(dropped, decoder.projection(site).weight)
            if rule.low_rank is not None:  # U V x stands in for a part of it
                u, v = (factor.to(dropped) for factor in rule.low_rank)
                error = error - dropped @ v.T @ u.T
            if rule.bias is not None:  # and so does the method's own bias
                error = error - rule.bias.to(error)
            probe = torch.zeros_like(output, requires_grad=True)
            seen[site] = (probe, error)
            return output + probe

        return hook

    generator = torch.Generator().manual_seed(seed)
    with ExitStack() as stack:
        stack.enter_context(frozen(model))
        stack.callback(tracker.watch(decoder.trunk).remove)
        for site in sites:
            stack.callback(decoder.linear(site).register_forward_hook(watch(site)).remove)
        for done, ids in enumerate(text, 1):
            with torch.enable_grad():
                hidden = final_hidden(model, ids[None].to(calibrated.device))
            hidden.backward(score(model, hidden[0].detach(), generator)[None])
            for site, (probe, error) in seen.items():
                gradient, e = (tracker.selection.take(t).double().cpu() for t in (probe.grad, error))  # type: ignore[arg-type]
                if not bool(torch.isfinite(gradient).all() and torch.isfinite(e).all()):
                    raise DivergedError(f"a gradient or an error at {site} of the dense model is NaN or infinite")
                sums.setdefault(site, _Sums()).add(gradient, e)
            calibrated.on_progress("fisher", done, len(text), "windows")
    return {site: of.solve(damping).float() for site, of in sums.items()}


def score(model: Any, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Computes the gradient in `hidden` [tokens, hidden] of the log-probability of labels drawn from the model."""
    gradients = []
    for states in hidden.split(CHUNK):
        states = states.requires_grad_()
        with torch.enable_grad():
            z = logits(model, states)
        p = z.detach().float().softmax(-1)
        if not bool(torch.isfinite(p).all()):
            raise DivergedError("logits of the dense model on the calibration text are NaN or infinite")
        labels = torch.multinomial(p.cpu(), 1, generator=generator).to(p.device)
        slope = -p
        slope.scatter_add_(1, labels, torch.ones_like(labels, dtype=slope.dtype))
        gradients.append(torch.autograd.grad(z, states, slope.to(z.dtype))[0])
    return torch.cat(gradients)
