"""`resting lm-eval`: item for item what the suite's own tasks give, and what stock lm-eval gives under the plan."""

from __future__ import annotations

import json
import random

import pytest
import tiny
import torch
import using
from likelihoods import close

from resting.benchmarks.cells.suite import TasksConfig
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.quality.tasks import building, catalogue
from resting.benchmarks.quality.tasks.evaluator import TaskEvaluator
from resting.sparsifier import silent
from resting.sparsifier.policy import parse


def documents() -> list[dict[str, object]]:
    """Questions with two answers, in the fields of PIQA."""
    chosen = random.Random(3)

    def words(n: int) -> str:
        return " ".join(chosen.choices(tiny.WORDS[:80], k=n))

    return [
        {"goal": words(3 + i % 5), "sol1": words(2 + i % 3), "sol2": words(1 + i % 4), "label": i % 2}
        for i in range(12)
    ]


@pytest.fixture
def task(monkeypatch):
    """Lm-eval's PIQA on these documents, as a suite builds it."""
    monkeypatch.setitem(catalogue.EMBEDDED, "piqa", catalogue.Embedded(lambda split: documents()))
    return building.build("piqa", None, 0)


def of_the_suite(task, tokens: str):
    """Answers and byte sparsity as a cell of a suite gets them."""
    model, tokenizer = using.model(using.room() / "model"), made_tokenizer()
    evaluator = TaskEvaluator(model, tokenizer, TasksConfig(names=["piqa"]), {}, silent)
    answers, sparsity, _ = evaluator.answers(task, using.plan(), parse(tokens))
    return answers, sparsity


def of_stock(task, tokens: str):
    """Stock lm-eval's answers, one request after the other, while the plan is applied."""
    from lm_eval.models.huggingface import HFLM

    model = using.model(using.room() / "model")
    stock = HFLM(pretrained=model, tokenizer=made_tokenizer(), batch_size=1, max_length=64)
    stock.logits_cache = False  # it shares a forward between requests that differ in their last token
    with using.plan().applied(model, parse(tokens)):
        return stock.loglikelihood(task.instances, disable_tqdm=True)


def made_tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(using.room() / "model")


@pytest.mark.parametrize("tokens", ["all-but-first:1", "all-but-first:4", "last-fraction:0.5", "decode-only:3"])
def test_answers_are_those_of_the_suite_and_of_stock_lm_eval(room, task, tokens):
    from resting.benchmarks.using.lm_eval_model import PlanLM

    lm = PlanLM(plan="plan", tokens=tokens)
    found = lm.loglikelihood(task.instances, disable_tqdm=True)
    answers, sparsity = of_the_suite(task, tokens)
    assert found == answers
    assert lm.get_model_info()["plan_byte_sparsity"] == sparsity
    close(found, of_stock(task, tokens))
    with pytest.raises(AssertionError):  # the dense model's are others
        close(found, of_stock(task, "all-but-first:64"))


def test_the_command_line_gives_them_item_for_item(room, task, monkeypatch, capsys):
    (room / "data.json").write_text("".join(json.dumps(document) + "\n" for document in documents()))
    config = {
        "include": str(building.manager().task_index["piqa"].yaml_path),
        "task": "mine",
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"validation": str(room / "data.json")}, "cache_dir": str(room / "cache")},
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    (room / "mine.yaml").write_text(json.dumps(config))
    command = ["lm-eval", "--model", "resting", "--model_args", "plan=plan,tokens=all-but-first:1", "--tasks", "mine"]
    command += ["--include_path", str(room), "--log_samples", "--output_path", str(room / "out"), "--limit", "10"]
    assert tiny.resting(monkeypatch, *command) == 0
    assert "|mine" in capsys.readouterr().out
    (file,) = (room / "out").rglob("samples_mine_*.jsonl")
    samples = sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda s: s["doc_id"])
    found = [(float(nats), greedy == "True") for s in samples for nats, greedy in s["filtered_resps"]]
    answers, _ = of_the_suite(task, "all-but-first:1")
    assert found == answers[:20]
    (results,) = (root for root in (room / "out").rglob("results_*.json"))
    written = json.loads(results.read_text())["config"]
    assert (written["plan_method"], written["plan_tokens"]) == ("mean-error(teal)", "all-but-first-1")
    assert written["plan_byte_sparsity"] == pytest.approx(0.5, abs=0.1)


def test_generated_text_is_that_of_the_plan(room):
    from lm_eval.api.instance import Instance

    from resting.benchmarks.using.lm_eval_model import PlanLM

    lm, tokenizer = PlanLM(plan="plan", pretrained="model", batch_size=2), made_tokenizer()
    prompts = [using.PROMPT, "w9 w8"]
    asked = {"until": ["never"], "max_gen_toks": 6}
    requests = [Instance("generate_until", {}, (prompt, asked), n) for n, prompt in enumerate(prompts)]
    found = lm.generate_until(requests, disable_tqdm=True)
    with using.plan().applied(lm.model):
        expected = [using.greedy(lm.model, tokenizer(prompt).input_ids, 6) for prompt in prompts]
    assert found == [tokenizer.decode(ids, skip_special_tokens=True).lstrip() for ids in expected]


def test_a_policy_without_a_sparse_token_is_refused_for_likelihoods(room, task):
    from resting.benchmarks.using.lm_eval_model import PlanLM

    with pytest.raises(BenchmarkError, match="tokens=decode-only leaves every token of a prompt dense"):
        PlanLM(plan="plan", tokens="decode-only").loglikelihood(task.instances, disable_tqdm=True)


def test_a_cache_of_answers_is_refused(room):
    from lm_eval.api.model import CachingLM

    from resting.benchmarks.using.lm_eval_model import PlanLM

    with pytest.raises(BenchmarkError, match="--use_cache: lm-eval's cache knows no plan"):
        CachingLM(PlanLM(plan="plan"), str(room / "answers.db"))


def test_the_model_is_dense_between_requests(room, task, ids):
    from resting.benchmarks.using.lm_eval_model import PlanLM

    lm = PlanLM(plan="plan")
    lm.loglikelihood(task.instances[:2], disable_tqdm=True)
    with torch.no_grad():
        assert torch.equal(lm.model(ids).logits, using.model(room / "model")(ids).logits)


def test_lm_eval_s_own_help_is_a_command_away(room, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "lm-eval", "run", "--help") == 0
    assert "--num_fewshot" in capsys.readouterr().out
    assert tiny.resting(monkeypatch, "lm-eval", "--help") == 0
    assert "resting lm-eval --model resting" in capsys.readouterr().out.replace("\n", " ")
