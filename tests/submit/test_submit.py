"""Sending in a result: what is refused in one sentence, what is written, and that it stands on the page."""

from __future__ import annotations

import json
import shutil
import subprocess

import numpy as np
import pytest
from page_folder import RESULTS
from results_folder import DENSE, folder_with, row, windows

from resting.benchmarks.checks.verify import Verified
from resting.benchmarks.cli import main
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.page import build, collect
from resting.benchmarks.submit import check as checking
from resting.benchmarks.submit import write as writing

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def change(folder, **of_machine):
    """Change what provenance.json says of the machine."""
    file = folder / "provenance.json"
    facts = json.loads(file.read_text())
    for machine in facts["machines"]:
        machine |= of_machine
    file.write_text(json.dumps(facts))
    return folder


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """Results that nothing is wrong with, of a commit that is taken for a known one."""
    monkeypatch.setattr(checking, "_is_known", lambda commits: "commits are clean and in the history")
    value = float(np.exp(DENSE.mean()))
    rows = [row("dense", value, 0.0, 0.0), row("teal", value * float(np.exp(0.2)))]
    folder = folder_with(tmp_path / "mine" / "small", rows, windows({("teal", 0.5): 0.2}), name="small")
    return change(folder, git={"commit": COMMIT, "dirty": False})


def submit(folder, output, *more):
    """Run the command; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        named = ["--name", "my-group", "--by", "Ada Lovelace", "--output", str(output)]
        patch.setattr("sys.argv", ["resting", "submit", str(folder), *named, *more])
        with pytest.raises(SystemExit) as done:
            main.main()
    return done.value.code or 0


def test_what_is_written(mine, tmp_path, capsys):
    assert submit(mine, tmp_path / "results", "--no-verify") == 0
    home = tmp_path / "results" / "community" / "my-group"
    facts = json.loads((home / "small" / "submission.json").read_text())
    assert facts["by"] == "Ada Lovelace"
    assert facts["commits"] == [COMMIT]
    assert facts["verified"] == "not measured again: --no-verify was given"
    assert set(facts["files"]) == {"results.csv", "windows.parquet", "provenance.json"}
    for name in facts["files"]:
        assert (home / "small" / name).read_bytes() == (mine / name).read_bytes()
    assert (home / "small" / "README.md").exists()
    about = (home / "README.md").read_text()
    for said in ("Ada Lovelace", "a processor, 2 cores", COMMIT[:12], "--no-verify"):
        assert said in about
    assert "2 values against their single windows" in capsys.readouterr().out
    assert not list(home.glob("*.partial"))


def test_the_page_says_who_measured_it_on_what(mine, tmp_path):
    root = tmp_path / "results"
    assert submit(mine, root, "--no-verify") == 0
    page = build.render(root)
    assert "community/my-group/small" in page
    assert "Ada Lovelace; not measured again: --no-verify was given" in page
    assert "a processor" in page


def test_losses_of_this_project_come_before_others(mine, tmp_path):
    root = tmp_path / "results"
    shutil.copytree(mine, root / "small")
    assert submit(mine, root, "--no-verify") == 0
    page = build.render(root)
    start = page.index(">", page.index('id="data"')) + 1
    data = json.loads(page[start : page.index("</script>", start)])
    (board,) = data["boards"]
    assert {data["folders"][point[-1]]["name"] for point in board["points"]} == {"small"}
    assert [folder.name for folder in collect.folders(root)] == ["community/my-group/small", "small"]


@pytest.mark.parametrize("agrees", [True, False])
def test_a_sample_is_measured_again(mine, tmp_path, monkeypatch, capsys, agrees):
    from resting.benchmarks.assets import models
    from resting.benchmarks.cells.suite import Suite
    from resting.benchmarks.checks import verify

    suite = type("Suite", (), {"models": ["tiny"]})
    monkeypatch.setattr(Suite, "model_validate", lambda facts: suite)
    monkeypatch.setattr(models, "resolve", lambda *_: None)
    found = [Verified("teal at 0.5: news_perplexity", 14.9, 14.9 if agrees else 17.0, 0.1, agrees)]
    monkeypatch.setattr(verify, "verify", lambda *_: found)
    code = submit(mine, tmp_path / "results")
    said = capsys.readouterr()
    home = tmp_path / "results" / "community"
    if agrees:
        facts = json.loads((home / "my-group" / "small" / "submission.json").read_text())
        assert code == 0
        assert facts["verified"].startswith("1 numbers of 2 cells measured again")
        assert facts["measured_again"] == [{"name": found[0].name, "committed": 14.9, "measured": 14.9}]
    else:
        assert code == 2
        assert "1 of 1 numbers differ by more than 0.01 when they are measured again" in said.err
        assert "14.9, now 17" in said.err
        assert not home.exists()


def test_without_its_model_it_says_so(mine, tmp_path, monkeypatch):
    from resting.benchmarks.assets import models
    from resting.benchmarks.cells.suite import Suite

    def nowhere(*_):
        raise BenchmarkError("no model here")

    monkeypatch.setattr(Suite, "model_validate", lambda facts: type("Suite", (), {"models": ["tiny"]}))
    monkeypatch.setattr(models, "resolve", nowhere)
    assert submit(mine, tmp_path / "results") == 0
    facts = json.loads((tmp_path / "results/community/my-group/small/submission.json").read_text())
    assert facts["verified"] == "not measured again: the model is not at hand (no model here)"
    assert submit(mine, tmp_path / "results", "--overwrite", "--model", "elsewhere") == 2


def test_times_are_said_to_be_of_one_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(checking, "_is_known", lambda commits: "")
    folder = tmp_path / "latency-8b-h200"
    shutil.copytree(RESULTS / "latency-8b-h200", folder)
    facts = json.loads((folder / "provenance.json").read_text())
    facts["measured_on"]["git"] = {"commit": COMMIT, "dirty": False}
    (folder / "provenance.json").write_text(json.dumps(facts))
    checked = checking.check(folder)
    assert checked.times
    assert checked.suite == "latency-8b-h200"


REFUSED = {
    "with changes; allowed: a clean commit": lambda f: change(f, git={"commit": COMMIT, "dirty": True}),
    "at commit None; allowed: one that is known": lambda f: change(f, git={"commit": None, "dirty": None}),
    "at commit '0123'; allowed": lambda f: change(f, git={"commit": "0123", "dirty": False}),
    "no results in": lambda f: (f / "provenance.json").unlink(),
    "no column 'method'": lambda f: (f / "results.csv").write_text("model,metric\na,b\n"),
    "no such cell": lambda f: edit(f, "cells", lambda cells: cells[:1]),
    "no number of cats at 0.5": lambda f: edit(f, "cells", lambda cells: [*cells, cells[1] | {"method": "cats"}]),
    "allowed: a sha256": lambda f: edit(f, "models", lambda models: [models[0] | {"sha256": "00"}]),
    "was measured on wikitext2": lambda f: edit(f, "assets", lambda _: {"wikitext2": "0" * 64}),
    "names no machine": lambda f: edit(f, "machines", lambda _: []),
    "windows.parquet gives": lambda f: rewrite(f, "teal,", ",14.", ",13."),
}


def edit(folder, key, change):
    file = folder / "provenance.json"
    facts = json.loads(file.read_text())
    file.write_text(json.dumps(facts | {key: change(facts[key])}))


def rewrite(folder, line, old, new):
    file = folder / "results.csv"
    lines = file.read_text().splitlines()
    assert any(line in one and old in one for one in lines)
    file.write_text("\n".join(one.replace(old, new) if line in one else one for one in lines) + "\n")


@pytest.mark.parametrize("said", REFUSED)
def test_what_is_refused(mine, tmp_path, capsys, said):
    REFUSED[said](mine)
    assert submit(mine, tmp_path / "results", "--no-verify") == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("name", "by"), [("My Group", "Ada"), ("../x", "Ada"), ("a", " "), ("a", "one\ntwo"), ("", "Ada")]
)
def test_names(name, by):
    with pytest.raises(BenchmarkError, match="allowed"):
        writing.check_name(name, by)


def test_nothing_is_replaced_unasked(mine, tmp_path, capsys):
    output = tmp_path / "results"
    assert submit(mine, output, "--no-verify") == 0
    assert submit(mine, output, "--no-verify") == 2
    assert "is there already; allowed: another --name, or --overwrite" in capsys.readouterr().err
    assert submit(mine, output, "--no-verify", "--overwrite") == 0


def test_check_of_what_was_sent_in(mine, tmp_path, capsys):
    output = tmp_path / "results"
    assert submit(mine, output, "--no-verify") == 0
    home = output / "community" / "my-group" / "small"
    assert submit(home, output, "--check") == 0
    assert "measured by Ada Lovelace" in capsys.readouterr().out
    (home / "results.csv").write_text((home / "results.csv").read_text() + "\n")
    assert submit(home, output, "--check") == 2
    assert "is not the file that was checked" in capsys.readouterr().err


def test_a_commit_has_to_be_of_this_history():
    inside = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if inside.returncode:
        pytest.skip("this is no git checkout")
    assert checking._is_known([inside.stdout.strip()])
    with pytest.raises(BenchmarkError, match="is not in this repository"):
        checking._is_known([COMMIT])
