"""Trains what a plan is compensated with: AdamW on a distance to the dense model, all weights frozen."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from resting.method.checkpoint import Checkpoint, State
from resting.method.compensation import Compensation
from resting.method.objectives import Objective, forward_kl
from resting.method.schedule import Schedule, shuffled
from resting.sparsifier import CalibratedModel, DivergedError, Meter, Plan, check_logits, evaluating, final_hidden


class Teacher:
    """Computes the dense model's final hidden states on the training sequences, once for all targets."""

    def __init__(self, model: Any, sequences: Tensor) -> None:
        self.model = model
        self.sequences = sequences
        self._hidden: dict[int, Tensor] = {}

    @torch.no_grad()
    def hidden(self, rows: list[int]) -> Tensor:
        """Gives hidden states [len(rows), window, hidden]; no plan may be applied when it is called."""
        missing = [row for row in rows if row not in self._hidden]
        if missing:
            with evaluating(self.model):
                hidden = final_hidden(self.model, self.sequences[missing].to(next(self.model.parameters()).device))
            self._hidden.update(zip(missing, hidden))
        return torch.stack([self._hidden[row] for row in rows])


def train(
    calibrated: CalibratedModel,
    compensation: Compensation,
    plan_at: Callable[[float], Plan],
    target: float,
    start: float,
    schedule: Schedule,
    spec: dict[str, Any] | None = None,
    objective: Objective = forward_kl,
) -> State:
    """Trains the parameters of `compensation` from where they are.

    Parameters
    ----------
    plan_at : callable
        From nominal ratio to the masks to train under.
    target : float
        Byte sparsity that the masks are kept at.
    start : float
        First nominal ratio.
    spec : dict, optional
        What else tells this run from others, for its checkpoint.

    Raises
    ------
    DivergedError
        If the loss, or what is trained, is NaN or infinite.
    """
    sequences = schedule.sequences(calibrated.calibration)
    order = shuffled(len(sequences), schedule.steps * schedule.batch, schedule.seed)
    key = f"teacher {schedule.window} {schedule.seed if schedule.shuffle_tokens else ''}"
    teacher: Teacher = calibrated.cached.setdefault(key, Teacher(calibrated.model, sequences))
    tokens = calibrated.calibration.statistics_policy_for(sequences)
    parameters = compensation.parameters
    rates = sorted({schedule.rate(name) for name in parameters})
    groups = [{"params": [p for name, p in parameters.items() if schedule.rate(name) == rate]} for rate in rates]
    optimizer = torch.optim.AdamW(groups, lr=1.0, weight_decay=0.0)
    state = State(parameters, {name: torch.zeros_like(p) for name, p in parameters.items()}, start)
    checkpoint = Checkpoint.of(calibrated, plan_at(start), asdict(schedule) | {"method": spec, "target": target})
    compensation.restore(checkpoint.restore(state, optimizer))
    began, first = time.monotonic(), state.step
    check_logits(calibrated.model)
    with frozen(calibrated.model), torch.enable_grad():
        while state.step < schedule.steps:
            stop = min(schedule.steps, state.step + schedule.match_every)
            rows = [order[i * schedule.batch : (i + 1) * schedule.batch] for i in range(state.step, stop)]
            dense = [teacher.hidden(r) for r in rows]
            meter, plan = Meter(), plan_at(state.nominal)
            with plan.applied(calibrated.model, tokens, meter) as layers:
                for row, target_states in zip(rows, dense):
                    for group, rate in zip(optimizer.param_groups, rates):
                        group["lr"] = rate * schedule.share(state.step)
                    compensation.attach(plan, layers)
                    ids = sequences[row].to(calibrated.device)
                    loss = _step(calibrated.model, ids, target_states, compensation, optimizer, objective, state.step)
                    state.losses.append(loss)
                    state.step += 1
                    if iterates := schedule.averaged(state.step):
                        for name, parameter in parameters.items():
                            _average(state.average[name], parameter.detach(), iterates)
                    speed = (state.step - first) * ids.numel() / (time.monotonic() - began)
                    note = f"loss {loss:.4f}, {speed:.0f} tokens/s"
                    calibrated.on_progress("train", state.step, schedule.steps, note)
            state.measured.append(meter.byte_sparsity())
            if schedule.match:
                state.nominal = min(0.999, max(0.0, state.nominal + 0.8 * (target - state.measured[-1])))
            checkpoint.save(state, optimizer, compensation.counters())
    for name, value in state.average.items():
        if not bool(torch.isfinite(value).all()):
            raise DivergedError(f"{name} became NaN or infinite in training: lower the learning rate")
    return state


def _average(average: Tensor, iterate: Tensor, count: int) -> None:
    """Takes `iterate` into `average`, in place, as the last of `count`.

    A GPU waits for launches, and gets one operation in place of three. It rounds in another way. On a processor that
    alone moved perplexities by up to 1 %, so that there the form stays with which results were measured.
    """
    if average.is_cuda:
        average.lerp_(iterate, 1 / count)
    else:
        average += (iterate - average) / count


def _step(
    model: Any,
    ids: Tensor,
    dense: Tensor,
    compensation: Compensation,
    optimizer: torch.optim.Optimizer,
    objective: Objective,
    step: int,
) -> float:
    sparse = final_hidden(model, ids)
    loss, gradient = objective(model, dense.flatten(0, 1), sparse.flatten(0, 1))
    if not math.isfinite(loss):
        raise DivergedError(f"the training loss became {loss} at step {step}: lower the learning rate")
    optimizer.zero_grad(set_to_none=True)
    sparse.backward(gradient.view_as(sparse))
    trained = [p for name, p in compensation.parameters.items() if not name.startswith(("threshold/", "channel/"))]
    nn.utils.clip_grad_norm_(trained, 1.0)
    compensation.before_step()
    optimizer.step()
    compensation.after_step()
    return loss


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turns gradients of weights and dropout off inside the ``with`` block; afterwards all is as before."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        model.requires_grad_(False)
        with evaluating(model):
            yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)
