"""Decodes under a plan by a step of the whole model, where its blocks have a known form."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from resting.sparsifier import fingerprint
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.decoding.batches import batches
from resting.sparsifier.decoding.contract import check
from resting.sparsifier.decoding.step.contract import Step
from resting.sparsifier.decoding.step.following import StepTracker, following
from resting.sparsifier.decoding.step.form import ModelForm
from resting.sparsifier.decoding.step.reading import read
from resting.sparsifier.decoding.step.running import UnknownFormError
from resting.sparsifier.decoding.step.serving import Follow, Served, served
from resting.sparsifier.decoding.step.store import Store
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.installing import installed
from resting.sparsifier.neurons.down import NeuronDown
from resting.sparsifier.plan import Plan
from resting.sparsifier.sites import Site
from resting.sparsifier.token_tracker import TokenTracker

_said: set[str] = set()


def known_form(model: nn.Module, decoder: Decoder, adapters: int = 0) -> ModelForm | None:
    """Reads the form of a model's blocks; where it is not known, says so once, and gives None.

    With `adapters` of a transform between its blocks, which are hooks, it is not asked for.

    Raises
    ------
    SparsifierError
        If there are no kernels for the model's device or dtype, or for a GPU no Triton.
    """
    weight = decoder.projection(decoder.sites()[0]).weight
    check(weight.dtype, weight.device)
    if weight.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise SparsifierError("decoding on a GPU needs Triton, which is not installed: pip install triton")
    try:
        if adapters:
            raise UnknownFormError(f"{adapters} adapters of the plan's rotations lie between its blocks")
        return read(model, decoder)
    except UnknownFormError as error:
        say_once(f"{type(model).__name__} decodes by the kernels of single layers, which is slower: {error}")
        return None


def say_once(message: str) -> None:
    """Warns, once in a process."""
    if message not in _said:
        _said.add(message)
        warnings.warn(message, stacklevel=4)


@contextmanager
def by_step(
    plan: Plan, model: Any, decoder: Decoder, form: ModelForm, tracker: TokenTracker, threads: int
) -> Iterator[None]:
    """Makes `model` decode single tokens by a step, and everything else by the masked definition.

    Raises
    ------
    UnknownFormError
        If the plan has a rule that a step does not compute with this form, and other kernels do.
    SparsifierError
        If there is no kernel for a rule.
    """
    weight = decoder.projection(decoder.sites()[0]).weight
    shapes = [(block.attention.groups, block.attention.size, block.attention.size) for block in form.blocks]
    with ExitStack() as stack:
        moving = fingerprint.Moving(model)
        stack.callback(moving.back)
        store = Store(shapes, weight.dtype, weight.device)
        step = _step(plan, model, decoder, form, store, threads)
        stack.callback(step.restore)  # also if what follows fails
        if reason := getattr(step, "reason", ""):
            say_once(f"{type(model).__name__} decodes with the numbers that its codes stand for: {reason}")
        moving.moved()
        layers = stack.enter_context(installed(decoder, plan.rules, tracker, neurons=plan.neurons))
        stack.enter_context(batches(decoder, layers.items()))
        stack.enter_context(served(model, step, tracker.policy, _following(plan, decoder, step, tracker)))
        stack.callback(moving.leaving)
        yield


def step_of(model: Any) -> Any:
    """Gives the step that a model decodes by at present; None where it has none."""
    return model.forward.step if isinstance(model.forward, Served) else None


def _step(plan: Plan, model: Any, decoder: Decoder, form: ModelForm, store: Store, threads: int) -> Step:
    if next(model.parameters()).device.type == "cuda":
        from resting.sparsifier.decoding.step.cuda_step import CudaStep

        return CudaStep(model, form, decoder, plan.rules, store, plan.target)
    from resting.sparsifier.decoding.step.cpu_step import CpuStep

    return CpuStep(model, form, decoder, plan.rules, store, threads, plan.neurons)


def _following(plan: Plan, decoder: Decoder, step: Any, tracker: TokenTracker) -> Follow | None:
    """Makes what keeps the neuron masks of a step those of the sequence that decodes; None where it has none."""
    if not plan.neurons:
        return None
    assert isinstance(tracker, StepTracker)
    modules: dict[Site, NeuronDown] = {}
    for site in plan.neurons:
        module = decoder.slots[site._replace(role="down")].module
        assert isinstance(module, NeuronDown)
        modules[site] = module
    return following(tracker, step.neurons.kept, modules)
