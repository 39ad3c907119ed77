"""Implements SPON, spontaneous neurons over any sparsifier (arXiv 2512.12744)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from resting.method.compensation import Compensation, Refined, Side
from resting.method.fisher import fisher_bias
from resting.method.mean_error import mean_dropped
from resting.method.objectives import OBJECTIVES
from resting.method.schedule import Decay, Schedule
from resting.method.training import train
from resting.sparsifier import LINEAR_ROLES, CalibratedModel, Compensated, Plan, Site, SparsifierError

BLOCKS = {
    "all": lambda block, count: True,
    "first-half": lambda block, count: block < count // 2,
    "last-half": lambda block, count: block >= count // 2,
    "every-other": lambda block, count: block % 2 == 0,
}


@dataclass
class Spontaneous(Compensated):
    r"""Trains an input-independent activation vector at the input of some layers, and folds it into their biases.

    .. math:: y = W (S(x) + \alpha) = W S(x) + b, \qquad b = W \alpha

    with S the masks of the wrapped sparsifier and one alpha in R^in a layer, zero at first, trained by the forward
    KL from the dense model's next-token distribution to the sparse model's, all weights frozen (section 3).

    The variant `spon-refined` has an alpha at all seven linear layers of a block, and moves the thresholds by the same
    KL: the masks become ``|x| > t e^delta`` with one trained delta per site, at constant bytes (`method.thresholds`).
    It differentiates across the jumps of the masks (`method.masks`), without which both are led astray.

    Parameters
    ----------
    inner : Sparsifier
        Gives masks and target.
    sites : tuple of str
        Roles that get an alpha; the paper's v1 finds `down` alone the most efficient.
    blocks : {"all", "first-half", "last-half", "every-other"}
        Blocks that get one.
    side : {"input", "output"}
        Train alpha, or the bias b itself: the same set of models, another path to it.
    vectors : int
        Alphas a layer. More than one at the same input add no capacity, since W (a + b) is one bias; their sum moves
        faster under Adam.
    coordinates : float
        Share of the entries of alpha that is kept after training, those of the largest ``|alpha_i| ||W[:, i]||``.
    thresholds : {"no", "site", "channel", "both"}
        What of the masks is trained: a threshold a site, one a channel, or one a site and, slower, a factor a channel.
    smoothing : float
        Half width, relative to the threshold, of the band over which the jump of a mask is spread in its derivative;
        0 is automatic differentiation, which does not see the jump.
    shift : bool
        Train a shift mu of every masked input as well: ``S(x - mu) + mu + alpha``, what rests becomes mu (after SCAP,
        whose mu is a statistic).
    gains : bool
        Train a factor of every kept input as well, folded into the columns of the weights of sparse tokens.
    rank : int
        Train an update of this rank of the weights of sparse tokens as well, added to them (0 for none). That is no
        spontaneous neuron: a control for what masks and biases leave, at the same bytes.
    objective : {"forward-kl", "reverse-kl", "hidden-mse"}
    start : {"zero", "mean-error", "fisher"}
        Where training begins: at the closed forms of `MeanError` and `FisherError`.
    learning_rate, threshold_rate, channel_rate, update_rate, warmup, decay
        See `method.schedule.Schedule`, as for what follows.
    steps, batch, window, average_from, match_every, shuffle_tokens, seed
        The defaults suit a 135M model on a CPU; the independent re-implementations
        of the paper use a rate of 1e-5, at which alpha hardly leaves zero in as many steps.
    match : bool
        Keep the *measured* byte sparsity at the target while alpha grows. With False the wrapped sparsifier's
        thresholds stay as they are, as in the paper: the sparse model then reads more bytes than its base does.
    """

    name: ClassVar[str] = "spon"
    paper: ClassVar[str] = "arXiv 2512.12744"
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "spon-refined": {"sites": LINEAR_ROLES, "thresholds": "site", "smoothing": 1.0},
    }

    blocks: Literal["all", "first-half", "last-half", "every-other"] = "all"
    side: Side = "input"
    vectors: int = 1
    coordinates: float = 1.0
    thresholds: Refined = "no"
    smoothing: float = 0.0
    shift: bool = False
    gains: bool = False
    rank: int = 0
    objective: Literal["forward-kl", "reverse-kl", "hidden-mse"] = "forward-kl"
    start: Literal["zero", "mean-error", "fisher"] = "zero"
    steps: int = 32
    batch: int = 8
    window: int = 128
    learning_rate: float = 1e-3
    threshold_rate: float = 0.03
    channel_rate: float = 0.01
    update_rate: float = 1e-3
    decay: Decay = "constant"
    warmup: int = 5
    average_from: float = 1 / 3
    match_every: int = 8
    match: bool = True
    shuffle_tokens: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vectors < 1:
            raise SparsifierError(f"vectors must be at least 1, got {self.vectors}")
        if not 0.0 <= self.coordinates <= 1.0:
            raise SparsifierError(f"coordinates must be in [0, 1], got {self.coordinates}")
        if self.side == "output" and (self.vectors > 1 or self.coordinates < 1.0):
            raise SparsifierError("vectors and coordinates belong to the input side, got side = 'output'")
        if self.rank < 0:
            raise SparsifierError(f"rank must be at least 0, got {self.rank}")
        if not 0.0 <= self.smoothing <= 1.0:
            raise SparsifierError(f"smoothing must be in [0, 1], got {self.smoothing}")
        allowed = {
            "blocks": BLOCKS,
            "side": ("input", "output"),
            "thresholds": ("no", "site", "channel", "both"),
            "decay": ("constant", "cosine"),
            "objective": OBJECTIVES,
            "start": ("zero", "mean-error", "fisher"),
        }
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise SparsifierError(f"{name} must be {' or '.join(values)}, got {getattr(self, name)!r}")
        self._schedule = Schedule(**{f.name: getattr(self, f.name) for f in fields(Schedule)})

    @property
    def replaces_weights(self) -> bool:
        """Tells whether gains or an update are folded into weights of its own."""
        return self.gains or self.rank > 0

    def fit_calibrated(self, calibrated: CalibratedModel) -> Plan:
        # One alpha for all token policies: it is trained on all tokens, whichever ones a policy will make sparse.
        everywhere = calibrated.under(calibrated.calibration.statistics_policy)
        compensation = self._compensation(everywhere)
        state = train(
            everywhere,
            compensation,
            lambda nominal: self.plan_at(everywhere, nominal),
            self.target,
            self.inner.plan_for(everywhere).nominal,
            self._schedule,
            self.spec(),
            OBJECTIVES[self.objective],
        )
        values = self._kept(calibrated, state.average)
        if self.match:
            plan = self.matched(calibrated, lambda plan: compensation.compensated(plan, values), start=state.nominal)
        else:
            plan = compensation.compensated(self.inner.plan_for(calibrated), values)
            plan = replace(plan, method=self.label, info=plan.info | {"matched": calibrated.measure(plan)})
        info: dict[str, Any] = {"losses": state.losses, "measured_while_training": state.measured}
        if self.thresholds != "no":
            deltas = {name.split("/")[1]: v for name, v in values.items() if name.startswith("threshold/")}
            info["threshold_factors"] = {site: round(float(delta.exp().mean()), 4) for site, delta in deltas.items()}
            plan.info.pop("ratios", None)  # no longer the shares that rest
        return replace(plan, info=plan.info | info)

    def _compensation(self, calibrated: CalibratedModel) -> Compensation:
        decoder, base = calibrated.decoder, self.inner.plan_for(calibrated)
        carries = BLOCKS[self.blocks]
        sites = [site for site in decoder.sites(self.sites) if carries(site.block, decoder.blocks)]
        plan = self.plan_at(calibrated, base.nominal)
        start = self._start(calibrated, plan, sites)
        return Compensation.of(
            decoder,
            sites,
            plan,
            calibrated.device,
            side=self.side,
            vectors=self.vectors,
            thresholds=self.thresholds,
            shift=self.shift,
            gains=self.gains,
            rank=self.rank,
            seed=self.seed,
            smoothing=self.smoothing,
            start=start,
        )

    def _start(self, calibrated: CalibratedModel, plan: Plan, sites: list[Site]) -> dict[Site, Tensor] | None:
        if self.start == "zero":
            return None
        biased = next((site for site in sites if site in plan.rules and plan.rules[site].bias is not None), None)
        if biased is not None:  # what the closed forms make up for, it has made up for in part
            raise SparsifierError(f"start must be zero: {self.inner.label} has a bias of its own at {biased}")
        weights = {site: calibrated.decoder.projection(site).weight.detach().float().cpu() for site in sites}
        if self.start == "mean-error":
            dropped = mean_dropped(calibrated, plan, self.sites)
            alphas = {site: dropped[site].float().cpu() for site in sites if site in dropped}
            return alphas if self.side == "input" else {site: weights[site] @ alpha for site, alpha in alphas.items()}
        biases = fisher_bias(calibrated, plan, sites)
        if self.side == "output":
            return biases
        # The least alpha with W alpha = b, or nearest to it where out > in.
        return {site: torch.linalg.lstsq(weights[site], bias[:, None]).solution[:, 0] for site, bias in biases.items()}

    def _kept(self, calibrated: CalibratedModel, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Keeps the entries of alpha in `values` that `coordinates` leaves."""
        kept = dict(values)
        for name, value in values.items():
            if name.startswith("alpha/") and self.coordinates < 1.0:
                weight = calibrated.decoder.projection(Site.parse(name.split("/")[1])).weight.detach().float()
                alpha = value.sum(0, keepdim=True)
                count = round(self.coordinates * alpha.shape[1])
                largest = (alpha[0].abs() * weight.norm(dim=0)).topk(count).indices
                kept[name] = torch.zeros_like(alpha).index_copy_(1, largest, alpha[:, largest])
        return kept
