"""SPON: spontaneous neurons over any sparsifier (arXiv 2512.12744)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from method.training import Schedule, train
from sparsifier import Compensated, Fitting, Plan, SparsifierError
from sparsifier.sparsifier import folded_bias


@dataclass
class Spontaneous(Compensated):
    r"""A trained, input-independent activation vector at the input of some layers, folded into their biases.

    .. math:: y = W (S(x) + \alpha) = W S(x) + b, \qquad b = W \alpha

    with S the masks of the wrapped sparsifier and one alpha in R^in a layer, zero at first, trained by the forward
    KL from the dense model's next-token distribution to the sparse model's, all weights frozen (section 3).

    Parameters
    ----------
    inner : Sparsifier
        Gives masks and target.
    sites : tuple of str
        Roles that get an alpha; the paper's v1 finds `down` alone the most efficient.
    steps, batch, window, learning_rate, warmup, average_from, match_every, seed
        See `method.training.Schedule`. The defaults suit a 135M model on a CPU; the independent re-implementations
        of the paper use a rate of 1e-5, at which alpha hardly leaves zero in as many steps.
    match : bool
        Keep the *measured* byte sparsity at the target while alpha grows. With False the wrapped sparsifier's
        thresholds stay as they are, as in the paper: the sparse model then reads more bytes than its base does.
    """

    name: ClassVar[str] = "spon"

    steps: int = 32
    batch: int = 8
    window: int = 128
    learning_rate: float = 1e-3
    warmup: int = 5
    average_from: float = 1 / 3
    match_every: int = 8
    match: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("steps", "batch", "window", "warmup", "match_every"):
            if getattr(self, name) < 1:
                raise SparsifierError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.learning_rate > 0:
            raise SparsifierError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0.0 <= self.average_from < 1.0:
            raise SparsifierError(f"average_from must be in [0, 1), got {self.average_from}")

    def fit_on(self, fitting: Fitting) -> Plan:
        base = fitting.plan(self.inner)
        schedule = Schedule(
            steps=self.steps,
            batch=self.batch,
            window=self.window,
            learning_rate=self.learning_rate,
            warmup=self.warmup,
            average_from=self.average_from,
            match_every=self.match_every,
            match=self.match,
            seed=self.seed,
        )
        # One alpha for all token policies: it is trained on all tokens, whichever ones a policy will make sparse.
        everywhere = fitting.under(fitting.calibration.statistics_policy)
        state = train(
            everywhere,
            lambda nominal: self.plan_at(everywhere, nominal),
            self.target,
            everywhere.plan(self.inner).nominal,
            self.sites,
            schedule,
            self.spec(),
        )
        biases = {site: folded_bias(fitting.decoder, site, alpha) for site, alpha in state.average.items()}
        plan = self.matched(fitting, biases, start=state.nominal) if self.match else self.with_biases(base, biases)
        return replace(plan, info=plan.info | {"losses": state.losses, "measured_while_training": state.measured})
