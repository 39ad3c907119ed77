"""Fits do not depend on the state that the model, torch and its random numbers are found in, and leave it as it was."""

from __future__ import annotations

import copy
from contextlib import ExitStack

import pytest
import torch
from families import SMALL
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from resting.baselines.cats import Cats
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.baselines.wina import Wina
from resting.method.fisher import FisherError
from resting.method.mean_error import MeanError
from resting.method.spontaneous import Spontaneous
from resting.method.training import Teacher, frozen
from resting.sparsifier import CalibratedModel, SparsifierError, Statistics, check_logits, evaluating, mean_nll

SHORT = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1}
METHODS = {
    "teal": lambda: Teal(target=0.5),
    "teal-greedy": lambda: Teal(target=0.5, allocation="greedy", step=0.2, windows=1, window=16),
    "cats": lambda: Cats(target=0.25),
    "wina": lambda: Wina(target=0.5),
    "rsparse-search": lambda: RSparse(target=0.5, search=True, population=3, generations=1, group=3),
    "mean-error": lambda: MeanError(Teal(target=0.5)),
    "fisher-error": lambda: FisherError(Teal(target=0.5), windows=1),
    "spon-refined": lambda: Spontaneous(
        Teal(target=0.5), sites=("q", "down"), thresholds="site", smoothing=1.0, **SHORT
    ),
}


def dropping() -> nn.Module:
    """A model with much dropout in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, attention_dropout=0.5))
    for block in model.model.layers:
        block.mlp.act_fn = nn.Sequential(block.mlp.act_fn, nn.Dropout(0.5))
    return model.eval()


def numbers(plan):
    """All that a plan decides."""
    return {f"{site}/{k}": t for site, rule in plan.rules.items() for k, t in rule.tensors().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_in_training_mode_is_the_fit_in_evaluation_mode(name, calibration):
    model = dropping()
    expected = numbers(METHODS[name]().fit(model, calibration))
    model.train()
    model.model.layers[1].eval()  # a mixture of modes comes back as a mixture
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    modes = {n: m.training for n, m in model.named_modules()}
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    torch.manual_seed(7)
    random = torch.get_rng_state()
    assert equal(numbers(METHODS[name]().fit(model, calibration)), expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("state", ["autocast", "inference", "no grad"])
def test_a_fit_does_not_depend_on_the_contexts_around_it(name, state, calibration):
    model = dropping()
    expected = numbers(METHODS[name]().fit(model, calibration))
    around = {
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "inference": torch.inference_mode,
        "no grad": torch.no_grad,
    }
    with around[state]():
        found = METHODS[name]().fit(copy.deepcopy(model) if state != "inference" else model, calibration)
    assert equal(numbers(found), expected)


def test_single_passes_run_in_evaluation_mode(calibration):
    model = dropping()

    def passes():
        calibrated = CalibratedModel(model, calibration)
        statistics = Statistics.collect(model, calibration)
        plan = Teal(target=0.5).plan_for(CalibratedModel(model, calibration))
        yield from (s.histogram.counts for s in statistics.sites.values())
        yield torch.tensor(calibrated.measure(plan))
        yield torch.tensor(mean_nll(model, calibration.windows, 4))
        yield Teacher(model, calibration.windows).hidden([0, 1])

    expected = list(passes())
    model.train()
    assert all(torch.equal(a, b) for a, b in zip(passes(), expected, strict=True))
    check_logits(model)
    assert all(m.training for m in model.modules())


def test_modes_come_back_after_an_exception(calibration):
    model = dropping().train()
    model.lm_head.eval()
    modes = [m.training for m in model.modules()]

    def fails(*args):
        assert not any(m.training for m in model.modules())
        raise SparsifierError("stopped")

    for run in (evaluating, frozen):
        with pytest.raises(SparsifierError, match="stopped"), run(model):
            fails()
        assert [m.training for m in model.modules()] == modes
    with pytest.raises(SparsifierError, match="stopped"):
        Teal(target=0.5).fit(model, calibration, on_progress=fails)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("enabled", [True, False])
def test_whether_gradients_are_recorded_is_left_alone(llama, enabled):
    with torch.set_grad_enabled(enabled), evaluating(llama):
        assert torch.is_grad_enabled() == enabled
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode())
        with evaluating(llama):
            assert not torch.is_inference_mode_enabled()
            assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled()
