"""Asks the tasks of a suite on one model: they are built once, and asked for every method."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from resting.benchmarks import cache
from resting.benchmarks.cells import code
from resting.benchmarks.cells.suite import Bos, TasksConfig
from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality.tasks import building
from resting.benchmarks.quality.tasks.building import BuiltTask
from resting.benchmarks.quality.tasks.likelihood import Cost, Scorer
from resting.benchmarks.quality.tasks.sharing_rows import may_share_rows
from resting.sparsifier import DivergedError, Meter, OnProgress, Plan, TokenPolicy, is_by_position

LONGEST_CONTEXT = 8192


@dataclass(frozen=True)
class Scored:
    """Holds what one method gave on one task.

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
    """Asks a model the tasks of a suite, each built once.

    Parameters
    ----------
    model : transformers.PreTrainedModel
    tokenizer : transformers.PreTrainedTokenizer
    config : TasksConfig
    setting : dict
        Determines the dense model's answers beside the requests: model, dtype, device, versions, code.
    on_progress : callable
    bos : {"auto", "always", "never"}
        What prompts begin with.
    """

    model: Any
    tokenizer: Any
    config: TasksConfig
    setting: dict[str, Any]
    on_progress: OnProgress
    bos: Bos = "auto"
    _built: dict[str, BuiltTask | AssetError] = field(default_factory=dict)
    _dense: dict[str, Scored] = field(default_factory=dict)

    def task(self, name: str) -> BuiltTask:
        """Return the task, built on the first call.

        Raises
        ------
        AssetError
            If its data cannot be had; again at every call.
        """
        if name not in self._built:
            self.on_progress(name, 0, 1, "prompts")
            try:
                self._built[name] = building.build(name, self.config.items, self.config.seed)
            except AssetError as error:
                self._built[name] = error
        found = self._built[name]
        if isinstance(found, AssetError):
            raise found
        return found

    @cached_property
    def lm(self) -> Any:
        """The model as lm-eval asks it; lm-eval is imported only where there are tasks."""
        from resting.benchmarks.quality.tasks.lm import PackedLM

        return PackedLM(self.model, self.tokenizer, Scorer(self.model, self.context), self.bos)

    @cached_property
    def _may_share_rows(self) -> bool:
        return may_share_rows(self.model)

    @property
    def context(self) -> int:
        """Number of tokens that the model takes."""
        config = self.model.config.get_text_config()
        return min(LONGEST_CONTEXT, getattr(config, "max_position_embeddings", LONGEST_CONTEXT))

    def score(self, name: str, plan: Plan, tokens: TokenPolicy) -> Scored:
        """Ask `name` under `plan`; the dense model's answers come from the cache where they were had before."""
        task = self.task(name)
        if not plan.is_dense:
            answers, byte_sparsity, cost = self.answers(task, plan, tokens)
            return Scored(task.metrics(answers), byte_sparsity, cost)
        if name not in self._dense:
            self._dense[name] = self._cached_dense(task, plan, tokens)
        return self._dense[name]

    def dense(self, name: str, plan: Plan, tokens: TokenPolicy) -> Scored:
        """Ask `name` of the dense model, to compare with."""
        bare = Plan({}, "dense", 0.0, 0.0, plan.model)
        return self.score(name, bare, tokens)

    def _cached_dense(self, task: BuiltTask, plan: Plan, tokens: TokenPolicy) -> Scored:
        identity = json.dumps([self.setting, task.digest], sort_keys=True, default=str)
        path = cache.root() / "tasks" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"
        try:
            known = json.loads(path.read_text())
            answers, cost = [(float(nats), bool(top)) for nats, top in known["answers"]], Cost(**known["cost"])
        except (OSError, ValueError, KeyError, TypeError):
            answers, _, cost = self.answers(task, plan, tokens)
            code.check_unchanged()
            cache.write_whole(path, json.dumps({"answers": answers, "cost": vars(cost)}))
        return Scored(task.metrics(answers), 0.0, cost)

    def answers(self, task: BuiltTask, plan: Plan, tokens: TokenPolicy) -> tuple[list[building.Answer], float, Cost]:
        """Ask a task under `plan`: answers, measured byte sparsity, and what it cost."""
        scorer = self.lm.scorer
        may_pack = plan.is_dense or (is_by_position(tokens) and not plan.needs_prompt)
        scorer.may_pack = may_pack and self._may_share_rows
        scorer.cost = Cost()
        scorer.name, scorer.on_progress = task.name, self.on_progress
        meter = Meter()
        with plan.applied(self.model, tokens, meter):
            answers = self.lm.loglikelihood(task.instances, disable_tqdm=True)
        if any(math.isnan(nats) for nats, _ in answers):  # the largest of them would be taken for an answer
            raise DivergedError(f"log-likelihoods of {task.name} are not finite")
        return answers, 0.0 if plan.is_dense else meter.byte_sparsity(), scorer.cost
