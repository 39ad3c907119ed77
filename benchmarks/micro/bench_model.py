"""Times what the suite does to a whole model: masked forwards, the statistics pass, a training step.

The model has the layers of SmolLM2-135M, six of its thirty blocks and random weights: nothing is fetched.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from resting.baselines.teal import Teal
from resting.benchmarks.checks.guard import speed
from resting.benchmarks.latency import timing
from resting.method.compensation import Compensation
from resting.method.schedule import Schedule
from resting.method.training import train
from resting.sparsifier import CalibratedModel, Calibration, Meter, Plan, Statistics, final_hidden

BATCH, LENGTH = 4, 128
ROUNDS = 15


@dataclass
class Subject:
    """A model with a fitted plan, and tokens for it."""

    model: Any
    ids: Tensor
    calibrated: CalibratedModel
    plan: Plan


@pytest.fixture(scope="module")
def subject() -> Subject:
    sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
    config = LlamaConfig(vocab_size=49152, num_hidden_layers=6, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(3, 49152, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    calibrated = CalibratedModel(model, Calibration(ids))
    return Subject(model, ids, calibrated, Teal(target=0.5).plan_for(calibrated))


@torch.no_grad()
def bench_forward_dense(benchmark: Any, subject: Subject) -> None:
    benchmark.group = "forward, 4 windows of 128 tokens"
    benchmark.pedantic(final_hidden, (subject.model, subject.ids), rounds=ROUNDS, warmup_rounds=1)


@pytest.mark.parametrize("metered", [False, True], ids=["not metered", "metered"])
@torch.no_grad()
def bench_forward_masked(benchmark: Any, subject: Subject, metered: bool) -> None:
    """Before every round a copy of the dense model runs, so that the ratio is of neighbours in time."""
    benchmark.group = "forward, 4 windows of 128 tokens"
    dense, seconds = copy.deepcopy(subject.model), list[float]()

    def run_dense() -> None:
        began = time.perf_counter()
        final_hidden(dense, subject.ids)
        seconds.append(time.perf_counter() - began)

    with subject.plan.applied(subject.model, meter=Meter() if metered else None):
        benchmark.pedantic(
            lambda: final_hidden(subject.model, subject.ids), setup=run_dense, rounds=ROUNDS, warmup_rounds=1
        )
    if benchmark.enabled:
        q1 = timing.quantile(seconds[1:], speed.QUANTILE)
        benchmark.extra_info["over_dense"] = round(benchmark.stats.stats.q1 / q1, 3)


def bench_statistics(benchmark: Any, subject: Subject) -> None:
    benchmark.group = "fitting"
    calibration = subject.calibrated.calibration
    benchmark.pedantic(Statistics.collect, (subject.model, calibration), rounds=ROUNDS, warmup_rounds=1)


def bench_training_step(benchmark: Any, subject: Subject) -> None:
    """One step of SPON at `down`; the teacher's states are there already."""
    benchmark.group = "fitting"
    calibrated, plan = subject.calibrated, subject.plan
    sites = calibrated.decoder.sites(("down",))
    compensation = Compensation.of(calibrated.decoder, sites, plan, calibrated.device)
    schedule = Schedule(
        steps=1,
        batch=2,
        window=LENGTH,
        learning_rate=1e-3,
        warmup=1,
        average_from=0.0,
        match_every=1,
        match=False,
        seed=0,
    )

    def step() -> None:
        train(calibrated, compensation, lambda nominal: plan, plan.target, plan.nominal, schedule)

    benchmark.pedantic(step, rounds=ROUNDS, warmup_rounds=1)
