"""Compares tasks with lm-eval's own command line, item by item, and what asking costs beside the model's passes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.quality.plans import fitted
from resting.benchmarks.quality.tasks import building
from resting.benchmarks.quality.tasks.catalogue import EMBEDDED
from resting.benchmarks.quality.tasks.likelihood import CHUNK, Scorer, Wanted
from resting.benchmarks.quality.tasks.packing import Batch
from resting.benchmarks.report.table import markdown
from resting.benchmarks.studies.study import Study, write
from resting.sparsifier import OnProgress, Plan
from resting.sparsifier.logits import logits

COMPARED = ("copa", "openbookqa")
"""Tasks that are asked whole, in float32, by both."""
TIMED = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande", "openbookqa", "boolq", "sciq")
"""The eight of the baselines' papers."""


def compare(study: Study, name: str, work: Path, on_progress: OnProgress) -> dict[str, Any]:
    """Count the items of `name` that have the same scores here and from lm-eval's command line.

    The command line reads lm-eval's own task file, in which nothing is overridden but where documents come from.
    """
    task = building.build(name, None, 0)
    here = task_model(study).loglikelihood(task.instances, disable_tqdm=True)
    on_progress("stock", 0, 1, f"lm-eval's command line, {name}")
    there = stock(study.source.folder, name, work, study.device)
    by_document: dict[int, list[float]] = defaultdict(list)
    for instance, (nats, _) in zip(task.instances, here):
        by_document[instance.doc_id].append(nats)
    gaps = [abs(a - b) for d, nats in by_document.items() for a, b in zip(nats, there[d]["nats"], strict=True)]
    row: dict[str, Any] = {"task": name, "items": len(there), "largest_gap": max(gaps)}
    for metric, values in task.metrics(here).items():
        others = [there[d][metric] for d in by_document]
        row[f"{metric}_here"], row[f"{metric}_there"] = sum(values) / len(values), sum(others) / len(others)
        row[f"{metric}_same"] = sum(a == b for a, b in zip(values, others, strict=True))
    return row


def task_model(study: Study) -> Any:
    """Load the dense model in float32, as this project asks it."""
    from resting.benchmarks.quality.tasks.lm import PackedLM

    model = study.source.load(torch.float32, study.device)
    return PackedLM(model, study.source.tokenizer(), Scorer(model, 2048))


def stock(folder: Path, name: str, work: Path, device: str = "cpu") -> dict[int, dict[str, Any]]:
    """Run ``lm_eval run``, and return log-likelihoods and metrics of every document of `name`.

    Raises
    ------
    SuiteError
        If the command fails.
    """
    data = EMBEDDED[name]
    documents = work / f"{name}.json"
    documents.write_text("".join(json.dumps(document) + "\n" for document in data.read(data.split)))
    entry: Any = building.index_of(name).task_index[name]
    config = {
        "include": str(entry.yaml_path),
        "task": f"stock_{name}",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {data.split: str(documents)}},
        "training_split": None,
        "validation_split": data.split,
        "test_split": None,
    }
    (work / f"{name}.yaml").write_text(json.dumps(config))  # which is YAML
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--tasks", f"stock_{name}", "--log_samples"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--include_path", str(work), "--batch_size", "8"]
    command += ["--device", device, "--output_path", str(work / "out")]
    ended = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    files = list((work / "out").rglob(f"samples_stock_{name}_*.jsonl"))
    if ended.returncode or not files:
        last = (ended.stderr.strip() or "no message").splitlines()[-1]
        raise SuiteError(f"lm-eval's command line ended with {ended.returncode} on {name}: {last}")
    found = {}
    for sample in map(json.loads, files[0].read_text().splitlines()):
        nats = [float(answer[0]) for answer in sample["filtered_resps"]]
        found[sample["doc_id"]] = {"nats": nats} | {metric: sample[metric] for metric in sample["metrics"]}
    return found


@dataclass
class Recorder(Scorer):
    """Keeps what goes through the model: batches, and the states that the output layer reads."""

    kept: list[tuple[Batch, list[tuple[int, int]]]] = field(default_factory=list)

    def _answers(self, batch: Batch, wanted: Wanted) -> list[tuple[float, bool]]:
        self.kept.append((batch, [(row, place) for row, places, _, _ in wanted for place in places]))
        return super()._answers(batch, wanted)

    def alone(self) -> float:
        """Time the same passes without anything that is made of them, and forget them."""
        kept, self.kept = self.kept, []
        began = time.perf_counter()
        with torch.no_grad():
            for batch, places in kept:
                rows, columns = torch.tensor(places).T
                for states in self._hidden(batch)[rows, columns].split(CHUNK):
                    logits(self.model, states)
            if states.is_cuda:
                torch.cuda.synchronize(states.device)
        return time.perf_counter() - began


def cost(loaded: LoadedModel, label: str, plan: Plan, tokens: Any) -> list[dict[str, Any]]:
    """Time asking every task, and the same batches through the model alone under the same plan: one row per task."""
    rows = []
    loaded.tasks.lm.scorer = scorer = Recorder(loaded.model, loaded.tasks.context)
    for name in (name for name in TIMED if loaded.suite.tasks and name in loaded.suite.tasks.names):
        began = time.perf_counter()
        task = loaded.tasks.task(name)
        built = time.perf_counter() - began
        began = time.perf_counter()
        loaded.tasks.answers(task, plan, tokens)
        asked = time.perf_counter() - began
        with plan.applied(loaded.model, tokens):
            alone = scorer.alone()
        rows.append({"task": name, "method": label, "items": task.n, "prompts": built, "asked": asked, "alone": alone})
    return rows


def run(study: Study, on_progress: OnProgress) -> Path:
    """Compare and time, and write tables into ``OUTPUT/SUITE-stock``.

    Raises
    ------
    SuiteError
        If the suite has none of the tasks that are compared or timed, or no sparsifier.
    """
    names = study.suite.tasks.names if study.suite.tasks else []
    compared = [name for name in COMPARED if name in names]
    cells = [cell for cell in study.cells() if cell.config.name != "dense"]
    cell: Cell | None = min(cells, key=lambda cell: abs(cell.target - 0.5), default=None)
    if cell is None or not compared or not set(TIMED) & set(names):
        needed = f"{' or '.join(COMPARED)}, and {' or '.join(TIMED)}"
        raise SuiteError(f"the study stock needs a suite with a sparsifier and the tasks {needed}")
    with tempfile.TemporaryDirectory() as work:
        same = pd.DataFrame([compare(study, name, Path(work), on_progress) for name in compared])
    alone = study.suite.model_copy(update={"methods": [cell.config]})  # statistics for no other method
    loaded = replace(study, suite=alone).loaded(on_progress)
    plan = fitted(loaded, cell)
    bare = Plan({}, "dense", 0.0, 0.0, plan.model)
    sparse = f"{cell.label} {cell.target:g}"
    times = pd.DataFrame([*cost(loaded, "dense", bare, cell.policy), *cost(loaded, sparse, plan, cell.policy)])
    return write(study, "stock", "Tasks against stock lm-eval", _parts(same, times), _frame(same, times))


def _frame(same: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    return pd.concat([same.assign(part="items"), times.assign(part="times")], ignore_index=True)


def _parts(same: pd.DataFrame, times: pd.DataFrame) -> list[str]:
    lines = []
    for _, row in same.iterrows():
        metrics = [column.removesuffix("_here") for column in same if column.endswith("_here")]
        for metric in (m for m in metrics if pd.notna(row[f"{m}_here"])):
            shares = [f"{row[f'{metric}_{side}']:.3f}" for side in ("here", "there")]
            equal = f"{row[f'{metric}_same']:.0f} of {row['items']}"
            lines.append([row.task, metric, *shares, equal, f"{row.largest_gap:.1e}"])
    about = (
        "Every item of a task, the dense model in float32: asked by this project, and by `lm_eval run` with lm-eval's "
        "own task file on the same documents. The gap is the largest between two log-likelihoods, in nats."
    )
    first = markdown(lines, ["task", "metric", "here", "lm-eval", "items with the same score", "largest gap"])
    sums = [(str(label), of[["prompts", "asked", "alone"]].sum()) for label, of in times.groupby("method", sort=False)]
    rows = [
        [label, f"{t.prompts:.1f}", f"{t.asked:.1f}", f"{t.alone:.1f}", f"{t.asked / t.alone:.3f}"] for label, t in sums
    ]
    count, items = times.task.nunique(), int(times["items"].max())
    second = markdown(rows, ["method", "prompts, s", "asking, s", "model alone, s", "asking over model"])
    cost = (
        f"Seconds for {count} tasks of at most {items} items: building the prompts, asking them all, and the same "
        "batches through the model alone, under the same plan, with the output layer for the states that are asked "
        "for. Prompts are built once for all methods, and tokenised once, in the dense model's time of asking; in a "
        "sparsifier's time is the measuring of its sparsity."
    )
    return [about, first, cost, second]
