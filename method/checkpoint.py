"""Keeps a training run on disk, written whole, so that a killed run goes on from it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resting.sparsifier import CalibratedModel, Plan, replacing


@dataclass
class State:
    """Says where a training run stands: this is what a checkpoint holds.

    Attributes
    ----------
    parameters, average : dict by name
        What is trained, and its average over the last part of the run.
    nominal : float
        Nominal ratio of the thresholds.
    losses, measured : list of float
        Loss at each step, and byte sparsity measured at each correction of the thresholds.
    """

    parameters: dict[str, nn.Parameter]
    average: dict[str, Tensor]
    nominal: float
    step: int = 0
    losses: list[float] = field(default_factory=list)
    measured: list[float] = field(default_factory=list)


class Checkpoint:
    """Keeps parameters, optimiser moments and counters in one file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    @classmethod
    def of(cls, calibrated: CalibratedModel, plan: Plan, settings: dict[str, Any]) -> Checkpoint:
        """Finds the checkpoint of a training run by the hash of all that determines the run."""
        if calibrated.folder is None:
            return cls(None)
        identity = [
            plan.model,
            calibrated.setting,
            calibrated.calibration.training_digest,
            plan.method,
            plan.nominal,
            settings,
        ]
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        folder = calibrated.folder / "training"
        folder.mkdir(parents=True, exist_ok=True)
        return cls(folder / f"{key}.safetensors")

    def save(self, state: State, optimizer: torch.optim.Optimizer, more: dict[str, float]) -> None:
        """Writes the state, the optimiser's moments and the counters `more`."""
        if self.path is None:
            return
        tensors = {f"value/{name}": p.detach().cpu() for name, p in state.parameters.items()}
        tensors |= {f"average/{name}": average.cpu() for name, average in state.average.items()}
        for name, parameter in state.parameters.items():
            moments = optimizer.state[parameter]
            tensors |= {f"{moment}/{name}": torch.as_tensor(v).cpu() for moment, v in moments.items()}
        counters = {
            "nominal": state.nominal,
            "step": state.step,
            "losses": state.losses,
            "measured": state.measured,
            "more": more,
        }
        with replacing(self.path) as temporary:
            save_file({k: t.clone() for k, t in tensors.items()}, temporary, {"counters": json.dumps(counters)})

    def restore(self, state: State, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Takes up where the file stands, if there is one, and returns the counters that were given to `save`."""
        if self.path is None or not self.path.exists():
            return {}
        with safe_open(self.path, "pt") as file:
            counters = json.loads(file.metadata()["counters"])
        tensors = load_file(self.path)
        named = [(*key.split("/", 1), key) for key in tensors]
        state.nominal, state.step = counters["nominal"], counters["step"]
        state.losses, state.measured = counters["losses"], counters["measured"]
        for name, parameter in state.parameters.items():
            parameter.data.copy_(tensors[f"value/{name}"])
            state.average[name].copy_(tensors[f"average/{name}"])
            keys = {moment: key for moment, of, key in named if of == name and moment not in ("value", "average")}
            moments = {moment: tensors[key] for moment, key in keys.items()}
            # Adam's counter stays on the CPU.
            optimizer.state[parameter] = {m: t if m == "step" else t.to(parameter.device) for m, t in moments.items()}
        return counters["more"]
