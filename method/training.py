"""Trains spontaneous activations: AdamW on the forward KL to the dense model, all weights frozen."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from method.divergence import forward_kl
from sparsifier import Calibration, Fitting, Meter, NonFiniteError, Plan, Site, SparsifierError
from sparsifier.logits import check_logits, final_hidden


@dataclass(frozen=True)
class Schedule:
    """How long and how fast.

    Parameters
    ----------
    steps : int
        Optimiser steps.
    batch : int
        Sequences a step.
    window : int
        Tokens a sequence; the calibration windows are cut into such pieces.
    learning_rate : float
        Constant after a linear warm-up.
    warmup : int
        Steps of warm-up.
    average_from : float
        Share of the steps after which alpha is averaged (Polyak-Ruppert); the average is the result. Gradients of a
        few thousand tokens are noisy in every coordinate, and the average is less so.
    match_every : int
        Steps between two corrections of the thresholds toward the target; also between two checkpoints.
    match : bool
        Whether thresholds are corrected at all.
    seed : int
        Order of the sequences.
    """

    steps: int
    batch: int
    window: int
    learning_rate: float
    warmup: int
    average_from: float
    match_every: int
    match: bool
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate of `step`, from 0."""
        return self.learning_rate * min(1.0, (step + 1) / self.warmup)

    def averaged(self, step: int) -> int:
        """Number of iterates in the average after `step` steps."""
        return max(0, step - int(self.average_from * self.steps))


@dataclass
class State:
    """Where a training run stands; what a checkpoint holds."""

    alphas: dict[Site, nn.Parameter]
    average: dict[Site, Tensor]
    nominal: float
    step: int = 0
    losses: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)


class Teacher:
    """The dense model's final hidden states on the training sequences, computed once for all targets."""

    def __init__(self, model: Any, sequences: Tensor) -> None:
        self.model = model
        self.sequences = sequences
        self._hidden: dict[int, Tensor] = {}

    @torch.no_grad()
    def hidden(self, rows: list[int]) -> Tensor:
        """Hidden states [len(rows), window, hidden]. Must be called while no plan is applied."""
        missing = [row for row in rows if row not in self._hidden]
        if missing:
            hidden = final_hidden(self.model, self.sequences[missing].to(next(self.model.parameters()).device))
            self._hidden.update(zip(missing, hidden))
        return torch.stack([self._hidden[row] for row in rows])


def train(
    fitting: Fitting,
    plan_at: Callable[[float], Plan],
    target: float,
    start: float,
    roles: tuple[str, ...],
    schedule: Schedule,
    spec: dict[str, Any] | None = None,
) -> State:
    """Train one alpha [in] at every site with one of `roles`, from zero.

    Parameters
    ----------
    plan_at : callable
        From nominal ratio to the masks to train under.
    target : float
        Byte sparsity that the masks are kept at while alpha grows.
    start : float
        First nominal ratio.
    spec : dict, optional
        What else tells this run from others, for its checkpoint.

    Raises
    ------
    NonFiniteError
        If the loss is NaN or infinite.
    """
    sequences = cut(fitting.calibration, schedule.window)
    order = shuffled(len(sequences), schedule.steps * schedule.batch, schedule.seed)
    teacher: Teacher = fitting.shared.setdefault(f"teacher {schedule.window}", Teacher(fitting.model, sequences))
    sites = fitting.decoder.sites(roles)
    tokens = fitting.calibration.statistics_policy_for(sequences)
    alphas = {
        site: nn.Parameter(torch.zeros(fitting.decoder.linear(site).in_features, device=fitting.device))
        for site in sites
    }
    optimizer = torch.optim.AdamW(alphas.values(), lr=schedule.learning_rate, weight_decay=0.0)
    state = State(alphas, {site: torch.zeros_like(a) for site, a in alphas.items()}, start)
    checkpoint = Checkpoint.of(fitting, plan_at(start), asdict(schedule) | {"method": spec, "target": target})
    checkpoint.restore(state, optimizer)
    began, first = time.monotonic(), state.step
    check_logits(fitting.model)
    with frozen(fitting.model), torch.enable_grad():
        while state.step < schedule.steps:
            stop = min(schedule.steps, state.step + schedule.match_every)
            rows = [order[i * schedule.batch : (i + 1) * schedule.batch] for i in range(state.step, stop)]
            dense = [teacher.hidden(r) for r in rows]
            meter = Meter()
            with plan_at(state.nominal).applied(fitting.model, tokens, meter) as layers:
                for site, alpha in alphas.items():
                    layers[site].spontaneous = alpha
                for row, target_states in zip(rows, dense):
                    for group in optimizer.param_groups:
                        group["lr"] = schedule.rate(state.step)
                    ids = sequences[row].to(fitting.device)
                    state.losses.append(_step(fitting.model, ids, target_states, optimizer, state.step))
                    state.step += 1
                    if iterates := schedule.averaged(state.step):
                        for site, alpha in alphas.items():
                            state.average[site] += (alpha.detach() - state.average[site]) / iterates
                    speed = (state.step - first) * ids.numel() / (time.monotonic() - began)
                    note = f"KL {state.losses[-1]:.4f}, {speed:.0f} tokens/s"
                    fitting.report("train", state.step, schedule.steps, note)
            state.measured.append(meter.byte_sparsity())
            if schedule.match:
                state.nominal = min(0.999, max(0.0, state.nominal + 0.8 * (target - state.measured[-1])))
            checkpoint.save(state, optimizer)
    return state


def _step(model: Any, ids: Tensor, dense: Tensor, optimizer: torch.optim.Optimizer, step: int) -> float:
    sparse = final_hidden(model, ids)
    loss, gradient = forward_kl(model, dense.flatten(0, 1), sparse.flatten(0, 1))
    if not math.isfinite(loss):
        raise NonFiniteError(f"the training loss became {loss} at step {step}: lower the learning rate")
    optimizer.zero_grad(set_to_none=True)
    sparse.backward(gradient.view_as(sparse))
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
    optimizer.step()
    return loss


def cut(calibration: Calibration, window: int) -> Tensor:
    """The calibration windows in pieces of `window` tokens, [n, window].

    Where all windows begin with the same token (BOS), so do all pieces.
    """
    windows = calibration.windows
    if calibration.attention_mask is not None:
        raise SparsifierError("training wants calibration windows without padding")
    begin = 1 if len(windows) > 1 and bool((windows[:, 0] == windows[0, 0]).all()) else 0
    pieces = (windows.shape[1] - begin) // (window - begin) if window > begin else 0
    if not pieces:
        raise SparsifierError(f"the training window must be from 2 to {windows.shape[1]} tokens, got {window}")
    body = windows[:, begin : begin + pieces * (window - begin)].reshape(-1, window - begin)
    return torch.cat([windows[:1, :begin].expand(len(body), -1), body], 1)


def shuffled(rows: int, count: int, seed: int) -> list[int]:
    """`count` row numbers, epoch by epoch, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-count // rows)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(epochs)])[:count].tolist()


@contextmanager
def frozen(model: nn.Module) -> Any:
    """No weight wants a gradient inside, nor has dropout; afterwards all is as before."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    training = model.training
    try:
        model.requires_grad_(False).eval()
        yield
    finally:
        model.train(training)
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


class Checkpoint:
    """Alpha, optimiser moments and counters in one file, written whole; a killed run goes on from it."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @classmethod
    def of(cls, fitting: Fitting, plan: Plan, settings: dict[str, Any]) -> Checkpoint:
        """The checkpoint of one training run: its name is the hash of all that determines the run."""
        if fitting.folder is None:
            return cls(None)
        identity = [plan.model, fitting.calibration.training_digest, plan.method, plan.nominal, settings]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder = fitting.folder / "training"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder / f"{key}.safetensors")

    def save(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        if self.path is None:
            return
        tensors = {f"alpha/{site}": alpha.detach().cpu() for site, alpha in state.alphas.items()}
        tensors |= {f"average/{site}": average.cpu() for site, average in state.average.items()}
        for site, alpha in state.alphas.items():
            tensors |= {f"{name}/{site}": torch.as_tensor(v).cpu() for name, v in optimizer.state[alpha].items()}
        counters = {
            "nominal": state.nominal,
            "step": state.step,
            "losses": state.losses,
            "measured": state.measured,
        }
        temporary = self.path.with_suffix(".partial")
        save_file({k: t.clone() for k, t in tensors.items()}, temporary, {"counters": json.dumps(counters)})
        temporary.replace(self.path)

    def restore(self, state: State, optimizer: torch.optim.Optimizer) -> None:
        if self.path is None or not self.path.exists():
            return
        with safe_open(self.path, "pt") as file:
            counters = json.loads(file.metadata()["counters"])
        tensors = load_file(self.path)
        named = [(key.split("/")[0], key.split("/")[1], tensor) for key, tensor in tensors.items()]
        state.nominal, state.step = counters["nominal"], counters["step"]
        state.losses, state.measured = counters["losses"], counters["measured"]
        for site, alpha in state.alphas.items():
            alpha.data.copy_(tensors[f"alpha/{site}"])
            state.average[site].copy_(tensors[f"average/{site}"])
            moments = {name: t for name, of, t in named if of == str(site) and name not in ("alpha", "average")}
            optimizer.state[alpha] = {name: t.to(alpha.device) if t.dim() else t for name, t in moments.items()}
