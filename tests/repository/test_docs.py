"""What the documentation shows runs, and what it names is there."""

from __future__ import annotations

import re
import runpy
import tomllib
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import models_page
import pytest
import tiny
import typer

import resting
from resting.benchmarks.assets import models
from resting.benchmarks.cells import registry
from resting.benchmarks.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "results" / part / "README.md" for part in ("", "method")),
    ]
)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _hook(name: str) -> dict[str, Any]:
    """What mkdocs runs when it builds the documentation."""
    return runpy.run_path(str(ROOT / "docs" / "hooks" / f"{name}.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings}, link


def test_every_command_and_option_is_in_the_reference():
    text = (ROOT / "docs" / "cli.md").read_text()
    page = SimpleNamespace(file=SimpleNamespace(src_uri="cli.md"))
    built = _hook("cli_reference")["on_page_markdown"](text, page=page)
    sections = dict(re.findall(r"^### resting (\S+)\n(.*?)(?=^### |\Z)", built, re.MULTILINE | re.DOTALL))
    assert set(sections) == set(COMMANDS)
    for name, command in COMMANDS.items():
        rows = [line for line in sections[name].splitlines() if line.startswith("| `")]
        for parameter in command.params:
            for option in (o for o in parameter.opts if o.startswith("--")):
                (row,) = (row for row in rows if re.search(rf"{option}(?![\w-])", row.split("|")[1]))
                assert re.search(r"\w{3,}", row.split("|")[2]), f"resting {name} {option} says nothing of itself"


def test_every_method_is_in_the_table_of_methods():
    page = SimpleNamespace(file=SimpleNamespace(src_uri="methods.md"))
    built = _hook("methods")["on_page_markdown"]((ROOT / "docs" / "methods.md").read_text(), page=page)
    own = {n for n, (cls, _) in registry.named().items() if cls.__module__.startswith("resting.")}
    rows = [line for line in built.splitlines() if line.startswith("| `") and ".py`" in line]
    assert own == {name for row in rows for name in re.findall(r"`([\w-]+)(?:\(\.\.\.\))?`", row.split("|")[1])}
    assert all(row.count("|") == 5 and row.split("|")[2].strip().endswith(".") for row in rows)
    assert "arxiv.org/abs/2408.14690" in next(row for row in rows if "`teal`" in row)


def test_formulas_of_docstrings_become_those_of_markdown():
    pytest.importorskip("mkdocs", reason="the documentation is built in an environment of its own (tox -e docs)")
    formulas = _hook("one_name")["formulas"]
    text = "    Says.\n\n    .. math::\n        a = b, \\qquad\n        c\n\n    With :math:`x_i` in it.\n"
    assert formulas(text) == "    Says.\n\n    \\[a = b, \\qquad c\\]\n\n    With \\(x_i\\) in it.\n"
    assert formulas("    .. math:: y = W x\n") == "    \\[y = W x\\]\n"


def test_katex_has_all_that_its_styles_ask_for():
    folder = ROOT / "docs" / "assets" / "katex"
    fonts = set(re.findall(r"url\(([^)]+)\)", (folder / "katex.min.css").read_text()))
    assert fonts == {f"fonts/{path.name}" for path in (folder / "fonts").iterdir()}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_and_suites_that_are_shown_exist(page):
    suites = {path.stem for path in (ROOT / "benchmarks" / "suites").glob("*.toml")}
    for command in re.findall(r"(?:^    |`)resting ([a-z][a-z-]*)", page.read_text(), re.MULTILINE):
        assert command in COMMANDS, command
    for names in re.findall(
        r"(?:^    |`)resting (?:run|verify)((?: [a-z][\w-]*(?![\w.:]))+)", page.read_text(), re.MULTILINE
    ):
        assert set(names.split()) <= suites, names


def test_the_readme_is_one_screen_and_its_links():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(" ".join(lines).split()) <= 800
    first = [
        line for line in lines[:60] if line.startswith(("```python", "![", "| `", "    pip install", "    resting "))
    ]
    assert first[0].startswith("![")
    assert sum(line.startswith("| `") for line in first) == 5
    assert sum(line.startswith("    resting ") for line in first) == 3
    assert "```python" in first


def test_a_claim_has_a_row_and_at_most_eighty_words():
    text = (ROOT / "results" / "README.md").read_text()
    rows = re.findall(r"^\| \[[^]]*\]\(#([\w-]+)\) \|", text, re.MULTILINE)
    claims = text.partition("## What holds for all of them")[0].split("\n### ")[1:]
    assert [claim.partition("\n")[0].lower().replace(" ", "-") for claim in claims] == rows
    for claim in claims:
        words = re.sub(r"\]\([^)]*\)", "]", claim.partition("\n")[2]).split()
        assert sum(bool(re.search(r"\w", word)) for word in words) <= 80, claim.partition("\n")[0]


def test_every_package_is_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for package in project["tool"]["setuptools"]["packages"]:
        folder = package.removeprefix("resting.").replace(".", "/")
        assert f"`{folder}/`" in text or folder == "benchmarks/cli/templates"
    for folder in re.findall(r"^\| `([\w/]+/)` \|", text, re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_the_citation_is_of_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_python_in_the_readme_runs(llama, monkeypatch, tmp_path, capsys):
    """The script as a reader would run it, on a tiny model and shorter windows."""
    monkeypatch.chdir(tmp_path)
    tiny.provide_texts(monkeypatch)
    source = SimpleNamespace(load=lambda dtype: llama, tokenizer=tiny.tokenizer)
    monkeypatch.setattr(models, "resolve", lambda name: source)
    short = {"window": 16, "statistics_windows": 4, "matching_windows": 2, "held_out_windows": 3, "progress": False}
    monkeypatch.setattr(resting, "fit", partial(resting.fit, **short))
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    share = float(re.search(r"'byte_sparsity': ([\d.]+)", capsys.readouterr().out)[1])
    assert share == pytest.approx(0.5, abs=0.1)
    assert resting.Plan.load(tmp_path / "plan-teal").info["measured"]["byte_sparsity"] == pytest.approx(share)


def test_the_page_of_models_is_current():
    assert models_page.PAGE.read_text() == models_page.page(), "run python tests/helpers/models_page.py"
