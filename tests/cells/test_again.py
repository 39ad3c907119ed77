"""The command that a report gives: it comes to the same suite again."""

from __future__ import annotations

import shlex

import pytest
import tiny
from typer.testing import CliRunner

from resting.benchmarks import again
from resting.benchmarks.cli import main
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.report import beginnings

MADE = {"name": "baselines-changed-0a1b2c", "sources": {"my text": {"where": "my text.txt"}}}


@pytest.mark.parametrize(
    ("suite", "folder", "expected"),
    [
        ({"name": "baselines"}, "baselines", "resting run baselines"),
        ({"name": "baselines"}, "baselines-qwen3-8b", "resting run baselines --model MODEL"),
        ({"name": "baselines"}, "baselines-bfloat16", "resting run baselines --dtype bfloat16"),
        ({"name": "baselines"}, "baselines-a-b-float32", "resting run baselines --model MODEL --dtype float32"),
        ({"name": "mine", "changed": {}}, "mine", "resting run mine.toml"),
        (
            MADE | {"changed": {"suite": "baselines", "choices": {"methods": ["teal", "spon(teal)"], "seeds": [0, 1]}}},
            MADE["name"],
            "resting run baselines --methods 'teal,spon(teal)' --seeds 2",
        ),
        (
            MADE | {"changed": {"suite": "baselines", "choices": {"seeds": [5, 7], "text": ["my text"]}}},
            MADE["name"],
            "resting run baselines --seeds 5,7 --text 'my text=my text.txt'",
        ),
        (
            {"name": "wide", "changed": {"suite": "baselines", "choices": {"windows": 9}}},
            "wide",
            "resting run baselines --windows 9 --name wide",
        ),
        ({"name": "my.suite"}, "my.suite", "resting run my.suite.toml"),
    ],
)
def test_the_command_names_the_suite_and_what_was_chosen(suite, folder, expected):
    assert again.command({"suite": suite}, folder) == expected


@pytest.mark.parametrize(
    ("suite", "study", "folder", "expected"),
    [
        ("writing", "writing", "writing", "resting study writing writing"),
        ("writing", "writing", "writing-qwen2-5-coder", "resting study writing writing --model MODEL"),
        ("writing-short", "writing", "writing-short-writing", "resting study writing writing-short"),
        ("tasks", "stock", "tasks-a-b-stock", "resting study stock tasks --model MODEL"),
        ("mine", "union", "mine-union", "resting study union mine.toml"),
    ],
)
def test_the_command_of_a_study_names_the_study(suite, study, folder, expected):
    assert again.command({"suite": {"name": suite}, "study": study}, folder) == expected


@pytest.mark.parametrize(
    ("measured", "option"),
    [
        ({"machines": [{"device": "cpu"}, {}]}, ""),
        ({"machines": [{"device": "cpu"}, {"device": "NVIDIA H200"}]}, " --device cuda"),
        ({"machines": [{"device": "NVIDIA H200, NVIDIA H200"}]}, " --device auto"),
        ({"measured_on": {"device": "cpu"}}, ""),
        ({"measured_on": {"device": "NVIDIA H200"}}, " --device cuda"),
    ],
)
def test_numbers_of_a_gpu_are_measured_again_on_one(measured, option):
    assert again.command({"suite": {"name": "latency"}} | measured) == f"resting run latency{option}"


def test_a_changed_suite_is_run_again_by_the_command_of_its_report(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.provide_texts(monkeypatch)
    tiny.model_folder(tmp_path / "model")
    text = tiny.SUITE.replace('name = "mine"', 'name = "mine"\nmodel = "model"')
    (tmp_path / "mine.toml").write_text(text)
    first = ["run", "mine.toml", "--windows", "100000", "--targets", "0.4", "--seeds", "1"]
    assert CliRunner().invoke(main.app, first, catch_exceptions=False).exit_code == 0
    (folder,) = (tmp_path / "results").iterdir()
    report = (folder / "README.md").read_text()
    command = report.split("Again: `")[1].split("`")[0]
    assert CliRunner().invoke(main.app, shlex.split(command)[1:], catch_exceptions=False).exit_code == 0
    assert list((tmp_path / "results").iterdir()) == [folder]
    assert "a seeded sample of 100000 a text. Shorter texts have fewer: " in report


def test_other_choices_replace_no_results_of_the_same_name(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.provide_texts(monkeypatch)
    tiny.model_folder(tmp_path / "model")
    (tmp_path / "mine.toml").write_text(tiny.SUITE.replace('name = "mine"', 'name = "mine"\nmodel = "model"'))
    named = ["run", "mine.toml", "--methods", "dense", "--name", "trial", "--windows"]
    for _ in range(2):  # the same choices again are the same suite
        assert CliRunner().invoke(main.app, [*named, "2"], catch_exceptions=False).exit_code == 0
    before = tiny.contents(tmp_path / "results")
    with pytest.raises(
        BenchmarkError, match=r"trial holds results of the suite trial with other choices \(.*windows: 2\)"
    ):
        CliRunner().invoke(main.app, [*named, "3"], catch_exceptions=False)
    assert tiny.contents(tmp_path / "results") == before


def test_fewer_windows_than_asked_for_are_said():
    facts = {"suite": {"evaluation": {"texts": ["a", "b"], "window": 8, "windows": 5}, "tasks": None}, "cells": []}
    assert beginnings.sentences(facts, {"a": 5, "b": 2}) == (
        "Windows of 8 tokens without overlap, a seeded sample of 5 a text. Shorter texts have fewer: 2 of b. "
    )
