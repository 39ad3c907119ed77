"""`resting lm-eval`: item for item what the suite's own tasks give, and what stock lm-eval gives under the plan."""

from __future__ import annotations

import functools
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
from resting.sparsifier import SparsifierError, silent
from resting.sparsifier.policy import parse


def words(chosen: random.Random, n: int) -> str:
    return " ".join(chosen.choices(tiny.WORDS[:80], k=n))


def documents() -> list[dict[str, object]]:
    """Questions with two answers."""
    chosen = random.Random(3)
    made = [(words(chosen, 3 + i % 5), words(chosen, 2 + i % 3), words(chosen, 1 + i % 4)) for i in range(12)]
    return [{"goal": goal, "answers": [a, b], "label": i % 2} for i, (goal, a, b) in enumerate(made)]


@pytest.fixture
def task(room, monkeypatch):
    """A task in a file, as a suite builds it from an index of nothing else, and as lm-eval's command line finds it."""
    import lm_eval.tasks

    (room / "data.json").write_text("".join(json.dumps(document) + "\n" for document in documents()))
    config = {
        "task": "mine",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(room / "data.json")}, "cache_dir": str(room / "cache")},
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "doc_to_text": "{{goal}} w80",
        "doc_to_choice": "{{answers}}",
        "doc_to_target": "label",
        "metric_list": [{"metric": "acc"}],
    }
    (room / "mine.yaml").write_text(json.dumps(config))  # which is YAML
    alone = functools.partial(lm_eval.tasks.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", alone)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)
    monkeypatch.setattr(building, "_whole", lambda: alone(include_path=str(room)))
    monkeypatch.setitem(catalogue.EMBEDDED, "mine", catalogue.Embedded(lambda split: documents()))
    return building.build("mine", None, 0)


def of_the_suite(task, tokens: str):
    """Answers and byte sparsity as a cell of a suite gets them."""
    model, tokenizer = using.model(using.room() / "model"), made_tokenizer()
    evaluator = TaskEvaluator(model, tokenizer, TasksConfig(names=["mine"]), {}, silent)
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


BAD = {
    "no plan": ({}, "--model_args plan=FOLDER is missing"),
    "no such plan": ({"plan": "nowhere"}, "plan nowhere: there is no such folder"),
    "no such model": ({"plan": "plan", "pretrained": "nowhere"}, "no model 'nowhere'"),
    "another argument": ({"plan": "plan", "token": 1}, "token=: the model 'resting' takes plan, pretrained, tokens,"),
    "an unknown policy": ({"plan": "plan", "tokens": "some"}, r"token policy 'some'; allowed: all-but-first\[:N\]"),
    "an unknown dtype": ({"plan": "plan", "dtype": "int8"}, "dtype=int8; allowed: auto, float32"),
    "no such device": ({"plan": "plan", "device": "cuda:99"}, "device 'cuda:99'; allowed: cpu"),
    "a long context": ({"plan": "plan", "max_length": 65}, "max_length=65; allowed: 1 to 64"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_refused(room, name):
    from resting.benchmarks.using.lm_eval_model import PlanLM

    arguments, message = BAD[name]
    with pytest.raises((BenchmarkError, SparsifierError), match=message):
        PlanLM.create_from_arg_obj(arguments, {"batch_size": 1, "device": None})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model_args", "plan=nowhere", "--tasks", "mine"), "plan nowhere: there is no such folder"),
        (("--model_args", "plan=plan,tokens=some", "--tasks", "mine"), "token policy 'some'; allowed: "),
        (("--model_args", "plan=plan", "--tasks", "yours"), "lm-eval: Tasks not found: yours"),
    ],
)
def test_bad_input_to_the_command_is_one_sentence(room, task, monkeypatch, capsys, more, message):
    command = ("lm-eval", "--model", "resting", "--include_path", str(room), *more)
    assert tiny.resting(monkeypatch, *command) == 2
    err = capsys.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_lm_eval_s_own_help_is_a_command_away(room, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "lm-eval", "run", "--help") == 0
    assert "--num_fewshot" in capsys.readouterr().out
    assert tiny.resting(monkeypatch, "lm-eval", "--help") == 0
    assert "resting lm-eval --model resting" in capsys.readouterr().out.replace("\n", " ")
