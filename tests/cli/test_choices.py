"""A suite that is changed on the command line, one that is made by `init`, what is listed, and the log of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import tiny

from resting.benchmarks import run as runner
from resting.benchmarks.cells import suite_file
from resting.benchmarks.cells.choices import Choices, changed
from resting.benchmarks.cells.options import Options
from resting.benchmarks.cli import complete, show
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.progress import Console

DOCUMENTS = [" ".join(f"w{(i * 7 + j) % 90}" for j in range(30)) for i in range(24)]


@pytest.fixture
def here(cache, tmp_path, monkeypatch):
    """A model, a suite and a text in the present folder."""
    monkeypatch.chdir(tmp_path)
    tiny.provide_texts(monkeypatch)
    tiny.model_folder(tmp_path / "model")
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    (tmp_path / "слова.txt").write_text("\n\n".join(DOCUMENTS), encoding="utf-8")
    return tmp_path


def rows(folder):
    return pd.read_csv(next(folder.glob("*/results.csv")))


def test_a_run_with_own_texts_and_methods_names_them_and_logs_what_it_does(here, monkeypatch, capsys):
    chosen = ("--methods", "teal,mean-error", "--targets", "0.25,0.5", "--seeds", "2", "--windows", "2")
    more = ("--texts", "wikipedia,слова.txt", "--calibration", "слова.txt", "--log", "log.jsonl")
    command = ("run", "mine.toml", "--model", "model", *chosen, *more, "--output", "out")
    assert tiny.resting(monkeypatch, *command, "--dry-run") == 0
    dry = capsys.readouterr().out
    assert "mean-error(teal)             0.25" in dry
    assert "text слова: 24 documents of слова.txt, sha256 " in dry
    assert "unknown for 5: no such cell was measured yet" in dry
    assert tiny.resting(monkeypatch, *command) == 0

    found = rows(here / "out")
    assert set(found.dataset) == {"wikipedia", "слова"}
    assert set(found.metric) == {f"{text}_{of}" for text in ("wikipedia", "слова") for of in ("perplexity", "kl")}
    assert set(found.method) == {"dense", "teal", "mean-error(teal)"}
    assert sorted(set(found.target)) == [0.0, 0.25, 0.5]
    assert found.value.notna().all()
    (folder,) = (here / "out").iterdir()
    assert folder.name.startswith("mine-changed-")
    facts = json.loads((folder / "provenance.json").read_text())
    assert facts["suite"]["changed"]["suite"] == "mine"
    assert facts["suite"]["changed"]["choices"]["methods"] == ["teal", "mean-error"]
    assert facts["assets"]["слова"] == facts["suite"]["sources"]["слова"]["sha256"]
    assert "Changed on the command line: methods: teal, mean-error" in (folder / "README.md").read_text()

    told = [json.loads(line) for line in (here / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [one["event"] for one in told] == [
        "run-started",
        *["cell-started", "cell-finished"] * 5,
        "run-finished",
    ]
    finished = [one for one in told if one["event"] == "cell-finished"]
    assert [(one["done"], one["total"], one["cached"]) for one in finished] == [(i, 5, False) for i in range(1, 6)]
    for one in finished:
        cell = one["cell"]
        mine = found[(found.method == cell["method"]) & (found.target == cell["target"])]
        assert one["metrics"] == dict(zip(mine.metric, mine.value))
    assert (told[-1]["folder"], told[0]["total"]) == (f"out/{folder.name}", 5)

    capsys.readouterr()
    assert tiny.resting(monkeypatch, *command, "--dry-run") == 0
    assert "time: none, all cells are measured already" in capsys.readouterr().out
    assert tiny.resting(monkeypatch, "verify", folder.name, "--model", "model", "--output", "out", "--sample", "1") == 0
    (here / "слова.txt").unlink()
    for copy in (here / "cache" / "texts" / "own").iterdir():
        copy.unlink()
    capsys.readouterr()
    assert tiny.resting(monkeypatch, "verify", folder.name, "--model", "model", "--output", "out") == 2
    assert "has no copy on this machine, and слова.txt is not here" in " ".join(capsys.readouterr().err.split())


def test_a_listener_is_called_and_one_that_fails_ends_no_run(here):
    suite, options = suite_file.load("mine.toml"), Options(here / "out", model="model")
    told = []
    runner.run(suite, options, on_event=lambda event: told.append(event["event"]))
    assert told.count("cell-finished") == 2

    def fails(event):
        told.append("again")
        raise RuntimeError("no network")

    runner.run(suite, options, on_event=fails)
    assert told.count("again") == 1
    told.clear()
    with pytest.raises(Exception, match="no model"):
        runner.run(suite, Options(here / "out", model="nothing-here"), on_event=told.append)
    assert told[-1]["event"] == "run-stopped"
    assert "no model" in told[-1]["reason"]


BAD = {
    ("--methods", "teel"): "unknown method 'teel' (did you mean 'teal'?)",
    ("--methods", "spon-refind"): "did you mean 'spon-refined'?",
    ("--methods", "teal,,cats"): "--methods 'teal,,cats': a name is missing",
    ("--targets", "half"): "--targets 'half'; allowed: numbers with commas",
    ("--targets", "1.5"): "targets.0 = 1.5: must be less than 1",
    ("--targets", "0.5,0.5"): "targets: 0.5 stands there twice",
    ("--targets", "nan"): "targets.0 = nan: must be a finite number",
    ("--seeds", "0"): "--seeds '0'; allowed: how many, such as 3",
    ("--seeds", "-1"): "--seeds '-1'; allowed: how many",
    ("--windows", "0"): "evaluation.windows = 0: must be greater than or equal to 1",
    ("--window", "3"): "evaluation.window = 3: must be greater than or equal to 8",
    ("--texts", "wikipaedia"): "'wikipaedia' is no known text (did you mean 'wikipedia'?)",
    ("--texts", "no.txt"): "the text file no.txt cannot be read",
    ("--calibration", "wikitext2"): "calibration.text: 'wikitext2' is no text to fit on",
    ("--text", "papers=слова.txt"): "papers comes with a package",
    ("--text", "a/b=слова.txt"): "'a/b' cannot be the name of a text",
    ("--name", "mine", "--seeds", "2"): "--name mine: that is the suite as it stands",
    ("--name", "other"): "--name other: nothing of suite mine is changed",
    ("--name", "baselines", "--seeds", "2"): "--name baselines: a suite of this project is called so",
    ("--name", "Other", "--seeds", "2"): "name = 'Other': String should match pattern",
    ("--log", "no/log.jsonl"): "cannot be written to: No such file",
}


@pytest.mark.parametrize("given", BAD, ids=" ".join)
def test_a_choice_that_is_wrong_is_refused_before_anything_is_measured(here, monkeypatch, capsys, given):
    assert tiny.resting(monkeypatch, "run", "mine.toml", "--model", "model", *given, "--output", "out") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert BAD[given] in said.replace(f"{Path.cwd()}/", "")
    assert "error: " in said
    assert not (here / "out").exists()


def test_choices_keep_the_suite_s_own_settings_and_name_a_folder_of_their_own():
    smoke = suite_file.load("smoke")
    found = changed(smoke, Choices(methods=["spon", "rsparse"], targets=[0.5], seeds=[3]))
    assert [(m.name, m.parameters.get("steps")) for m in found.methods] == [
        ("dense", None),
        ("spon(teal)", 4),
        ("rsparse", None),
    ]
    assert [p.methods for p in found.policies] == [["rsparse"]]
    assert found.name != smoke.name
    assert changed(smoke, Choices(methods=["spon", "rsparse"], targets=[0.5], seeds=[3])).name == found.name
    assert changed(smoke, Choices(seeds=[3])).name != found.name
    assert changed(smoke, Choices()) is smoke
    assert changed(smoke, Choices(targets=[0.3])).policies == []
    assert changed(smoke, Choices(targets=[0.3], name="other")).name == "other"
    with pytest.raises(SuiteError, match="--windows: suite latency measures time"):
        changed(suite_file.load("latency"), Choices(windows=3))


def test_a_file_for_a_name_that_the_suite_has_not_is_measured_on_too(here):
    suite = suite_file.load("mine.toml")
    assert changed(suite, Choices(files={"own": "слова.txt"})).evaluation.texts == ["wikipedia", "own"]
    fitted = changed(suite, Choices(files={"own": "слова.txt"}, calibration="own"))
    assert (fitted.evaluation.texts, fitted.calibration.text) == (["wikipedia"], "own")
    assert changed(suite, Choices(files={"wikitext2": "x"})) is suite


def test_init_writes_a_suite_that_runs_and_replaces_none(here, monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "init", "Try it.toml") == 0
    assert "next: resting run" in capsys.readouterr().out
    small = ("--windows", "2", "--window", "16", "--targets", "0.5", "--methods", "teal", "--name", "small")
    suite = suite_file.load("Try it.toml")
    assert suite.name == "try-it"
    text = (here / "Try it.toml").read_text().replace("= 256", "= 16").replace("_windows = 16", "_windows = 4")
    (here / "Try it.toml").write_text(text)
    assert tiny.resting(monkeypatch, "run", "Try it.toml", "--model", "model", *small, "--output", "out") == 0
    assert set(rows(here / "out").method) == {"dense", "teal"}
    assert tiny.resting(monkeypatch, "init", "Try it.toml") == 2
    assert "Try it.toml exists and is not overwritten" in capsys.readouterr().err
    assert (here / "Try it.toml").read_text() == text
    for name, said in (("suite", "does not end with .toml"), ("no/a.toml", "no is no folder"), ("ж.toml", "no name")):
        assert tiny.resting(monkeypatch, "init", name) == 2
        assert said in " ".join(capsys.readouterr().err.split())


def test_lists_have_every_name_with_paper_and_file(monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "list", "methods", "--json") == 0
    found = {one["name"].removesuffix("(METHOD)"): one for one in json.loads(capsys.readouterr().out)}
    assert found.keys() >= {"teal", "teal-greedy", "spon", "spon-refined", "chess-attention", "wina-released-greedy"}
    assert set(complete.method_names()) == set(found)  # what is completed without torch is what there is
    assert found["teal-greedy"]["paper"] == found["teal"]["paper"] == "Liu et al. 2024, arXiv 2408.14690"
    assert found["spon-refined"]["file"] == "method/spontaneous.py"
    assert found["teal-greedy"]["what"] != found["teal"]["what"]
    root = Path(__file__).parents[2]
    assert all((root / one["file"]).is_file() for one in found.values())
    assert tiny.resting(monkeypatch, "list", "suites") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(suite_file.available()) + 5  # a title and the head of a Markdown table
    assert tiny.resting(monkeypatch, "list", "--json") == 0
    assert set(json.loads(capsys.readouterr().out)) == {"methods", "suites", "models", "texts", "tasks"}


def test_names_are_completed():
    assert complete.suites("smo") == ["smoke"]
    assert complete.methods("teal,spon") == ["teal,spon", "teal,spon-refined"]
    assert complete.models("smol") == ["smollm2-135m"]


def test_a_cell_of_a_table_stays_one_cell():
    assert show.markdown(["a"], [["x | y\nz"]]) == "| a |\n| --- |\n| x \\| y z |"


def test_without_a_terminal_a_line_says_now_and_then_how_far_a_run_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = Console()
    console.begin(0, 4, "teal")
    now[0] = 10.0
    console.stage("train", 1, 9)
    console.finished([])
    now[0] = 60.0
    console.begin(1, 4, "cats")
    now[0] = 61.0
    console.begin(2, 4, "cats")
    console.end()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines == ["cells: 1 of 4, 60 s so far, about 3 min left (cats)"]


def test_without_a_terminal_a_study_or_a_fit_says_now_and_then_how_far_it_is(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    console = Console()
    for seconds, done in ((5.0, 1), (40.0, 3), (60.0, 4), (120.0, 7)):
        now[0] = seconds
        console.stage("statistics", done, 9)
    console.end()
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert lines == ["statistics 3 of 9, 40 s since the beginning", "statistics 7 of 9, 2 min since the beginning"]
