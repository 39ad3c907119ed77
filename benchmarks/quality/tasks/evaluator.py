"""The tasks of a suite on one model: built once, asked for every method."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from resting.benchmarks import cache
from resting.benchmarks.cells.suite import TasksConfig
from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality import intervals
from resting.benchmarks.quality.tasks import building
from resting.benchmarks.quality.tasks.building import BuiltTask
from resting.benchmarks.quality.tasks.likelihood import Cost, Scorer
from resting.sparsifier import Meter, OnProgress, Plan, TokenPolicy, is_by_position

LONGEST_CONTEXT = 8192


@dataclass(frozen=True)
class Scored:
    """What one method gave on one task.

    Attributes
    ----------
    items : dict of str to list of float
        Metrics, item by item (`BuiltTask.metrics`).
    byte_sparsity : float
        Measured on these prompts; 0 for the dense model.
    cost : Cost
    """

    items: dict[str, list[float]]
    byte_sparsity: float
    cost: Cost


@dataclass
class TaskEvaluator:
    """Asks the tasks of a suite.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizer
    table : TasksConfig
    setting : dict
        What determines the dense model's answers beside the requests: model, dtype, device, versions.
    report : callable
    """

    model: Any
    tokenizer: Any
    table: TasksConfig
    setting: dict[str, Any]
    report: OnProgress
    _built: dict[str, BuiltTask | AssetError] = field(default_factory=dict)
    _dense: dict[str, Scored] = field(default_factory=dict)

    def task(self, name: str) -> BuiltTask:
        """The task, built on the first call.

        Raises
        ------
        AssetError
            If its data cannot be had; again at every call.
        """
        if name not in self._built:
            self.report(name, 0, 1, "prompts")
            try:
                self._built[name] = building.build(name, self.table.items, self.table.seed)
            except AssetError as error:
                self._built[name] = error
        found = self._built[name]
        if isinstance(found, AssetError):
            raise found
        return found

    @cached_property
    def _lm(self) -> Any:
        from resting.benchmarks.quality.tasks.lm import PackedLM

        return PackedLM(self.model, self.tokenizer, Scorer(self.model, self.context))

    @property
    def context(self) -> int:
        """Tokens that the model takes."""
        config = self.model.config.get_text_config()
        return min(LONGEST_CONTEXT, getattr(config, "max_position_embeddings", LONGEST_CONTEXT))

    def score(self, name: str, plan: Plan, tokens: TokenPolicy) -> Scored:
        """Ask `name` under `plan`; the dense model's answers come from the cache where they were had before."""
        task = self.task(name)
        if plan.rules:
            answers, byte_sparsity, cost = self._answers(task, plan, tokens)
            return Scored(task.metrics(answers), byte_sparsity, cost)
        if name not in self._dense:
            self._dense[name] = self._cached_dense(task, plan, tokens)
        return self._dense[name]

    def dense(self, name: str, plan: Plan, tokens: TokenPolicy) -> Scored:
        """The same with no rule of `plan`, to compare with."""
        bare = Plan({}, "dense", 0.0, 0.0, plan.model)
        return self.score(name, bare, tokens)

    def _cached_dense(self, task: BuiltTask, plan: Plan, tokens: TokenPolicy) -> Scored:
        identity = json.dumps([self.setting, task.digest], sort_keys=True, default=str)
        path = cache.root() / "tasks" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
        try:
            known = json.loads(path.read_text())
            answers, cost = [(float(nats), bool(top)) for nats, top in known["answers"]], Cost(**known["cost"])
        except (OSError, ValueError, KeyError, TypeError):
            answers, _, cost = self._answers(task, plan, tokens)
            cache.write_whole(path, json.dumps({"answers": answers, "cost": vars(cost)}))
        return Scored(task.metrics(answers), 0.0, cost)

    def _answers(self, task: BuiltTask, plan: Plan, tokens: TokenPolicy) -> tuple[list[building.Answer], float, Cost]:
        scorer = self._lm.scorer
        scorer.may_pack = (not plan.rules or is_by_position(tokens)) and not has_sliding_window(self.model)
        scorer.cost = Cost()
        scorer.tick = lambda done, total: self.report(task.name, done, total, "sequences")
        meter = Meter()
        with plan.applied(self.model, tokens, meter):
            answers = self._lm.loglikelihood(task.instances, disable_tqdm=True)
        return answers, meter.byte_sparsity() if plan.rules else 0.0, scorer.cost


def has_sliding_window(model: Any) -> bool:
    """Whether some layer sees only the last tokens: then a row must be one sequence."""
    config = model.config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return getattr(config, "sliding_window", None) is not None
    return any(kind != "full_attention" for kind in kinds)


def summary(metric: str, items: list[float]) -> tuple[float, float]:
    """Value of a metric and its standard error over items."""
    values = np.asarray(items, dtype=float)
    error = float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan
    if metric == "perplexity":  # the items are log-likelihoods
        value = math.exp(min(700.0, -values.mean()))
        return value, value * error
    return float(values.mean()), error


def paired(metric: str, items: list[float], dense: list[float]) -> intervals.Interval:
    """Difference to dense; of perplexities in nats."""
    sign = -1.0 if metric == "perplexity" else 1.0
    return intervals.difference([sign * v for v in items], [sign * v for v in dense])
