"""Estimates how long cells take, from how many tokens go through the model and how fast machines were.

The model of a cell's time is small: tokens of matching, training, evaluation and tasks, each times what it costs in
forwards, over the measured tokens a second. Searches and decompositions of a method come on top, and the first cell
loads the model and runs it dense.
"""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cache as memoise
from importlib import resources
from typing import Any

from resting.benchmarks.cells import text_sizes
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.suite import Suite, Tokens
from resting.sparsifier import Compensated, Sparsifier

FILE = "rates.toml"
MATCHES = 4
"""Runs over the matching windows until a method meets its target, typically."""
TRAINED, REFINED = 4, 8
"""Forwards that one token of training costs: the dense one, the sparse one, and a backward of two; twice that where
masks are trained as well."""
SCORED = 1.5
"""Forwards that one scored token costs: its logits are taken of both models."""
SEARCHED = 5
"""Forwards that a token of a greedy search costs on the 135M, since it goes block by block in small pieces (58 s where
SPON takes 20 s, in docs/scale.md)."""
TOKENS_PER_ITEM, BESIDE_TASK = 250, 2.0
"""Tokens that an item of a task costs, in forwards of text, and seconds that a task takes beside (results/tasks and
tasks-short)."""
BESIDE = 1.5
"""Seconds of a cell that are neither."""
REACH = 2.0
"""How many times larger or smaller than a measured model another may be for its rate to be known."""


@dataclass(frozen=True)
class Machine:
    """Holds the rates of one machine: by parameters of a model, tokens a second."""

    name: str
    device: str
    dtype: str
    rates: tuple[tuple[float, float], ...]

    def tokens_per_second(self, parameters: float) -> float | None:
        """Interpolate between measured models, or take that of the nearest; None where none is near."""
        below = max((rate for rate in self.rates if rate[0] <= parameters), default=None)
        above = min((rate for rate in self.rates if rate[0] >= parameters), default=None)
        if below is not None and above is not None and below != above:
            share = math.log(parameters / below[0]) / math.log(above[0] / below[0])
            return math.exp((1 - share) * math.log(below[1]) + share * math.log(above[1]))
        nearest = below if below is not None else above
        if nearest is None or not 1 / REACH <= parameters / nearest[0] <= REACH:
            return None
        return nearest[1] * nearest[0] / parameters


@memoise
def machines() -> list[Machine]:
    """Read the machines in ``assets/rates.toml``."""
    text = resources.files("resting.benchmarks.assets").joinpath(FILE).read_text(encoding="utf-8")
    return [
        Machine(
            of["name"], of["device"], of["dtype"], tuple((r["parameters"], r["tokens_per_second"]) for r in of["rates"])
        )
        for of in tomllib.loads(text)["machines"]
    ]


def evaluated_tokens(suite: Suite) -> int:
    """Count the tokens of all evaluation windows, of a whole text about."""
    of = suite.evaluation
    step = of.stride or of.window
    windows = (min(of.windows or 10**9, text_sizes.tokens(suite, text) // step) for text in of.texts)
    return sum(max(1, count) * of.window for count in windows)


def forwards(suite: Suite, cell: Cell) -> float:
    """Count the tokens of `cell` in forwards of text, without what a method searches or decomposes."""
    method, calibration = cell.sparsifier, suite.calibration
    total = SCORED * evaluated_tokens(suite)
    if suite.tasks is not None:
        total += TOKENS_PER_ITEM * (suite.tasks.items or 2000) * len(suite.tasks.names)
    if cell.config.name == "dense":
        return total
    matching = calibration.matching_window * calibration.matching_windows * len(calibration.matching_texts)
    # One that wraps another has it fitted first, which the other's own cell may have done.
    asks = getattr(method, "match", True) and method.protocol == "common"
    total += MATCHES * matching if asks else 0
    sizes: list[Any] = [getattr(method, name, None) for name in ("steps", "batch", "window", "match_every")]
    is_trained = all(isinstance(size, int) and size > 0 for size in sizes)
    if is_trained and _is_first(suite, cell):  # another's method may have one of these names for something else
        steps, batch, window, every = sizes
        each = REFINED if getattr(method, "thresholds", "no") != "no" else TRAINED
        total += each * steps * batch * window
        total += matching * steps / every if asks else 0
    return total


def searched(method: Sparsifier) -> float:
    """Count the tokens of a greedy search in forwards: each step tries every projection; other searches are unknown."""
    given: Any = method
    while isinstance(given, Compensated):
        given = given.inner
    if getattr(given, "allocation", "") != "greedy":
        return 0.0
    return SEARCHED * len(given.roles) * given.target / given.step * given.windows * given.window


def _is_first(suite: Suite, cell: Cell) -> bool:
    """Whether no cell of its method and target comes before it: what was trained once serves all token policies."""
    name, target = cell.config.name, cell.target
    policies: list[Tokens] = [suite.tokens] if target in (cell.config.targets or suite.targets) else []
    policies += [p for p in suite.policies if target in p.targets and (p.methods is None or name in p.methods)]
    return not policies or str(policies[0].build()) == str(cell.policy)


def seconds(suite: Suite, cell: Cell, parameters: float | None, machine: Machine) -> float | None:
    """Estimate the seconds of `cell` on a model with so many weights; None where the rate is not known."""
    if parameters is None or suite.dtype != machine.dtype:
        return None
    rate = machine.tokens_per_second(parameters)
    return None if rate is None else BESIDE + BESIDE_TASK * len(suite.task_names) + forwards(suite, cell) / rate


def shown(value: float | None) -> str:
    """Write seconds as a person says them."""
    if value is None:
        return "unknown"
    if value < 90:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 5400 else f"{value / 3600:.1f} h"
