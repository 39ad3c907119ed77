"""What is timed: a model to be made sparse by plans, with its own weights or with random ones in a published shape."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from resting.benchmarks.assets import models
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.latency import random_models
from resting.benchmarks.latency.setting import Setting
from resting.benchmarks.names import RANDOM, of_weights, with_format
from resting.benchmarks.quality import fits
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.plans import check_method, fitted
from resting.benchmarks.quality.weight_formats import in_formats, stored_as
from resting.sparsifier import (
    CalibratedModel,
    Calibration,
    Compensated,
    Decoder,
    Plan,
    SparsifierError,
    Statistic,
)
from resting.sparsifier.fingerprint import declare
from resting.sparsifier.quantised.formats import AS_IS, Format
from resting.sparsifier.quantised.model import check, format_of, quantise, same_codes
from resting.sparsifier.roles import ACT


class TimedModel(ABC):
    """Holds the copies of one model that are timed beside each other, and gives the plans to time them under.

    Parameters
    ----------
    name, weights : str
        What rows call the model, and its weights.
    copies : list of transformers.PreTrainedModel
        Two: the dense one, and the one to be made sparse.
    ids : Tensor [1, prompt + decoded tokens + 1]
        What is decoded.

    Attributes
    ----------
    format : Format or None
        What the block linears of the copy to be made sparse are stored in; None where they are as the dense one's.
    """

    def __init__(self, name: str, weights: str, copies: list[Any], ids: Tensor) -> None:
        self.name, self.weights, self.copies, self.ids = name, weights, [*copies], ids
        self.dense, self.sparse = copies
        self.format = format_of(self.sparse)

    @cached_property
    def third_copy(self) -> Any:
        """Makes one more copy, to be made sparse beside the second."""
        return self._another()

    @cached_property
    def fourth_copy(self) -> Any:
        """Makes one more copy, for the codes of a quantised model with nothing at rest."""
        return self._another()

    def _another(self) -> Any:
        self.copies.append(copy.deepcopy(self.sparse))
        same_codes(self.sparse, self.copies[-1])
        return self.copies[-1]

    @abstractmethod
    def declare(self) -> None:
        """Name the weights of all copies again, after they were laid out anew."""

    @abstractmethod
    def plan(self, cell: Cell) -> Plan:
        """Fit the method of `cell`.

        Raises
        ------
        SparsifierError
            If it has no plan at this target.
        """

    def without_biases(self, cell: Cell, plan: Plan) -> Plan | None:
        """Take away what a method adds biases to: the same masks without them; None for other methods."""
        if not isinstance(cell.sparsifier, Compensated):
            return None
        return replace(plan, rules={site: replace(rule, bias=None) for site, rule in plan.rules.items()})


class RealModel(TimedModel):
    """Times a model with its own weights, under the plans that quality is measured with.

    Parameters
    ----------
    loaded : LoadedModel
        Fits the plans.
    copies, ids
        As for `TimedModel`.
    """

    def __init__(self, loaded: LoadedModel, copies: list[Any], ids: Tensor) -> None:
        super().__init__(loaded.source.name, of_weights(loaded.source.sha256), copies, ids)
        self._loaded = loaded

    def declare(self) -> None:
        """Leave the weights as they are: they are known by their values."""

    def plan(self, cell: Cell) -> Plan:
        return fitted(self._loaded, cell)


class RandomModel(TimedModel):
    """Times random weights: thresholds are fitted to their activations, low-rank parts and biases are random as well.

    Parameters
    ----------
    shape : str
    copies, ids
        As for `TimedModel`.
    windows : Tensor [n, length]
        What thresholds are fitted on.
    """

    def __init__(self, shape: str, copies: list[Any], ids: Tensor, windows: Tensor) -> None:
        format = format_of(copies[1])
        name = random_models.name_of(shape)
        super().__init__(name if format is None else with_format(name, format.name), RANDOM, copies, ids)
        self._calibrated = CalibratedModel(self.sparse, Calibration(windows, batch_size=4))
        self._calibrated.factors = random_models.RandomFactors()

    def declare(self) -> None:
        for model in self.copies:
            declare(model, self.name)

    def plan(self, cell: Cell) -> Plan:
        self.declare()
        method, inner = cell.sparsifier, cell.sparsifier
        check_method(AS_IS if self.format is None else self.format.name, method)
        while isinstance(inner, Compensated):
            inner = inner.inner
        plan = inner.plan_for(self._calibrated)
        if not isinstance(method, Compensated):
            return plan
        sites = getattr(method, "sites", ("down",))
        width = self.sparse.config.hidden_size
        biased = {
            site: replace(rule, bias=torch.randn(width) / 100)
            for site, rule in plan.rules.items()
            if site.role in sites and site.role in ("o", "down") and site.role != ACT
        }
        return replace(plan, rules=plan.rules | biased, method=cell.label)


def check_groups(setting: Setting) -> None:
    """Refuse a weight format whose group does not divide the outputs of what a suite times.

    Raises
    ------
    SuiteError
        For a published shape.
    ModelError
        For a model with its own weights, also if it is quantised already.
    """
    formats = [format for name in setting.suite.weights if (format := Format.parse(name)) is not None]
    for spec in setting.on_device.models if formats else []:
        if spec not in random_models.shapes():
            source = models.resolve(spec, setting.console.say, setting.console.stage, trusted=setting.trusted)
            in_formats([source], setting.suite.weights)
            continue
        model = random_models.random_model(spec, torch.bfloat16, "meta")
        decoder = Decoder.of(model)
        for format in formats:
            try:
                check(model, decoder, format)
            except SparsifierError as error:
                raise SuiteError(f"--weights {format.name}: {error}") from error


def load(spec: str, dtype: str, setting: Setting, weights: str = AS_IS) -> TimedModel:
    """Load what a suite times: a published shape by its name, or any other model with its own weights.

    The block linears of the copy to be made sparse are stored in the format `weights`.

    Raises
    ------
    AssetError
        If there is neither a shape nor a model of that name.
    """
    kind, device = getattr(torch, dtype), setting.device
    length = setting.config.prompt + setting.config.decoded_tokens + 1
    if spec in random_models.shapes():
        found = [random_models.random_model(spec, kind, device) for _ in range(2)]
        if (format := Format.parse(weights)) is not None:
            quantise(found[1], format)
        size = found[0].config.vocab_size
        generator = torch.Generator().manual_seed(1)
        ids, windows = (torch.randint(3, size, shape, generator=generator) for shape in ((1, length), (3, 48)))
        return RandomModel(spec, found, ids.to(device), windows)
    console = setting.console
    source = models.resolve(spec, console.say, console.stage, trusted=setting.trusted)
    fits.check(setting.suite, source)
    needs = frozenset[Statistic]().union(*(cell.sparsifier.needs for cell in setting.cells))
    stored = stored_as(source, weights)
    loaded = LoadedModel(setting.suite, stored, device, console.stage, needs)
    ids = loaded.windows("papers", "evaluation", length, 1).ids
    found = [source.load(kind).to(device), stored.load(kind).to(device)]
    return RealModel(loaded, found, ids.to(device))
