"""Bad input to the commands that use plans: one sentence, exit code 2, and nothing is lost or left."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
import using
from families import build

from resting.sparsifier import Plan, Rule, Site


def another_model(room: Path) -> None:
    build("llama", seed=1).save_pretrained(room / "model")


def newer(room: Path) -> None:
    file = room / "plan" / "plan.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))


def no_model_named(room: Path) -> None:
    plan = Plan.load(room / "plan")
    replace(plan, info={}).save(room / "plan")


def model_elsewhere(room: Path) -> None:
    (room / "model").rename(room / "moved")


def exported(room: Path) -> None:
    (room / "plan").rename(room / "masks")
    (room / "plan").mkdir()
    (room / "masks").rename(room / "plan" / "masks")


def shifted(room: Path) -> None:
    plan = Plan.load(room / "plan")
    rule = Rule(threshold=0.1, shift=torch.ones(32))
    replace(plan, rules=plan.rules | {Site(0, "q"): rule}).save(room / "plan")


def file_of(name: str) -> Callable[[Path], object]:
    def act(room: Path) -> None:
        (room / name).parent.mkdir(parents=True, exist_ok=True)
        (room / name).write_text("mine")

    return act


def nothing(room: Path) -> None:
    pass


GENERATE = ("generate", "--plan", "plan", "--prompt", "w1 w2", "--max-new-tokens", "4")
EXPORT = ("export", "--plan", "plan", "-o", "out")
CASES = {
    "no folder": (nothing, ("generate", "--plan", "nowhere", "--prompt", "w1"), "--plan nowhere: there is no such"),
    "no plan": (nothing, ("generate", "--plan", "model", "--prompt", "w1"), "there is no plan in it, which has a file"),
    "the plan of an exported model": (exported, GENERATE, "that of an exported model is plan/masks"),
    "a plan of a newer format": (newer, GENERATE, "its format is newer than 1, namely 99: update resting-neurons"),
    "another model": (
        another_model,
        GENERATE,
        "--plan plan and --model model do not go together: this plan was fitted",
    ),
    "a plan that names no model": (no_model_named, GENERATE, "does not say which model it was fitted on; --model"),
    "a model that has moved": (model_elsewhere, GENERATE, "(so the plan names its model; --model says where else"),
    "no model": (nothing, (*GENERATE, "--model", ""), "--model '' names none"),
    "no GPU": (nothing, (*GENERATE, "--device", "cuda:99"), "--device 'cuda:99'; allowed: cpu"),
    "a dtype": (nothing, (*GENERATE, "--dtype", "int8"), "--dtype 'int8'; allowed: float32, bfloat16"),
    "no tokens": (nothing, (*GENERATE, "--max-new-tokens", "0"), "--max-new-tokens"),
    "a temperature below 0": (nothing, (*GENERATE, "--temperature", "-1"), "--temperature"),
    "no template": (nothing, (*GENERATE, "--chat"), "--chat: the tokenizer of this model has no chat template"),
    "no prompt": (nothing, (*GENERATE, "--prompt", ""), "--prompt '' has no token; allowed: at least one"),
    "a prompt too long": (nothing, (*GENERATE, "--prompt", "w1 " * 64), "the prompt has 64 tokens; allowed: up to 63"),
    "too many tokens": (
        nothing,
        (*GENERATE, "--max-new-tokens", "63"),
        "--max-new-tokens 63 after a prompt of 2 tokens is beyond the context of 64; allowed: up to 62",
    ),
    "no plan to export": (nothing, ("export", "--plan", "nowhere", "-o", "out"), "--plan nowhere: there is no such"),
    "another model to export": (another_model, EXPORT, "do not go together: this plan was fitted on model"),
    "a plan with shifts": (shifted, EXPORT, "shifts the input at 0.q: such a plan cannot be folded"),
    "a folder with something": (file_of("out/a"), EXPORT, "holds something else than an exported model"),
    "such a folder to overwrite": (file_of("out/a"), (*EXPORT, "--overwrite"), "it is not overwritten"),
    "a file": (file_of("out"), EXPORT, "--output out is no folder; allowed: a new one"),
    "no arguments": (nothing, ("lm-eval",), "lm-eval needs arguments"),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_sentence(name, room, monkeypatch, capsys):
    act, arguments, message = CASES[name]
    act(room)
    before = tiny.contents(room)
    assert tiny.resting(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    (said,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert message in said
    assert "Traceback" not in err
    assert tiny.contents(room) == before


def test_a_plan_stays_with_its_model():
    assert using.plan().info["fitted"]["model"] == "model"
