"""What the documentation shows as output is compared with what commands print; and what a built site loads."""

from __future__ import annotations

import importlib.util
import os
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").glob("*.md"))


def _script(name: str) -> ModuleType:
    loader = SourceFileLoader(name.replace("-", "_"), str(ROOT / ".ci" / name))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[loader.name] = module
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = kept
    return module


docs_output = _script("docs-output")
offline = _script("offline")


@pytest.fixture
def page(tmp_path):
    path = tmp_path / "page.md"

    def write(mark, block):
        path.write_text(f"# Title\n\n<!-- {mark} -->\n```text\n{block}```\n\nMore.\n")
        return path

    return write


def test_the_same_output_is_no_difference(page):
    assert docs_output.check(page("output quick: echo hello", "hello\n"), quick=True) == []


def test_another_output_is_shown_and_written(page):
    path = page("output: printf 'two\\nlines\\n'", "one\n")
    (difference,) = docs_output.check(path)
    assert "-one" in difference
    assert "+lines" in difference
    assert docs_output.check(path, write=True) == []
    assert path.read_text().endswith("```text\ntwo\nlines\n```\n\nMore.\n")
    assert docs_output.check(path) == []


def test_slow_commands_are_left_out_of_the_quick_ones(page):
    assert docs_output.check(page("output: echo other", "hello\n"), quick=True) == []


@pytest.mark.parametrize(
    ("words", "shown", "now", "same"),
    [
        ("about", "loss 0.400 [0.38, 0.42]", "loss 0.41 [0.39, 0.43]", True),
        ("about", "loss 4.00", "loss 6.00", False),
        ("about", "loss 0.400", "gain 0.400", False),
        ("about", "| a | 8,176 |", "| a   | 8,100 |", True),
        ("", "loss 0.400", "loss 0.401", False),
        ("varies", "took 3 ms", "needed 9 s", True),
    ],
)
def test_how_far_figures_may_be_off(words, shown, now, same):
    assert docs_output.agree(shown, now, frozenset(words.split())) is same


def test_a_command_that_fails_is_no_output(page):
    with pytest.raises(SystemExit, match="exit code 3"):
        docs_output.check(page("output varies: echo half; exit 3", "half\n"))


def test_an_unknown_word_is_named(page):
    with pytest.raises(SystemExit, match="roughly; allowed: about, quick, varies"):
        docs_output.check(page("output roughly: echo 1", "1\n"))


def test_files_of_a_page_are_there_for_its_commands(tmp_path):
    path = tmp_path / "page.md"
    path.write_text("<!-- file: a.toml -->\n```toml\nx = 1\n```\n\n<!-- output: cat a.toml -->\n```text\nx = 1\n```\n")
    assert docs_output.check(path) == []


def test_pages_have_marks_and_their_quick_output_is_current(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    shown = {path: docs_output.blocks(path.read_text()) for path in PAGES}
    assert sum(block.kind == "output" for found in shown.values() for block in found) >= 8
    for path, found in shown.items():
        if any("quick" in block.words for block in found):
            assert docs_output.check(path, quick=True) == [], (
                f"{os.path.relpath(path, ROOT)}: run .ci/docs-output --write"
            )


@pytest.mark.parametrize(
    ("html", "said"),
    [
        ('<script src="https://cdn.example/a.js"></script>', "from the network"),
        ('<link rel="stylesheet" href="//fonts.example/a.css">', "from the network"),
        ('<p style="background: url(http://example/a.png)">', "from the network"),
        ('<img src="missing.png">', "is not there"),
        ('<a href="https://example.org">a link</a><img src="data:image/png;base64,AA">', None),
    ],
)
def test_what_a_site_loads(tmp_path, html, said):
    (tmp_path / "index.html").write_text(html)
    found = offline.problems(tmp_path)
    assert (found == []) if said is None else (len(found) == 1 and said in found[0])


def test_styles_are_read_too(tmp_path):
    (tmp_path / "a.css").write_text('@import "https://example/b.css"; @font-face { src: url(fonts/a.woff2) }')
    assert len(offline.problems(tmp_path)) == 2


def test_a_figure_is_looked_for_in_the_folders_beside_it(tmp_path, monkeypatch):
    figures = _script("figures")
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    folder = tmp_path / "results" / "mine"
    (folder / "tables").mkdir(parents=True)
    (folder / "README.md").write_text("TEAL loses 0.4003.\n")
    (folder / "tables" / "a.csv").write_text("a,b\n1.582,2\n")
    (folder / "decode.csv").write_text("model,sparse_p20\nx,0.00353\n")
    text = "# A\n0.400, 1.58 and 3.53 [mine](results/mine/README.md), `0.123`, 0.50\n## B\n0.400\n"
    (first, named), (second, none) = [part for part in figures.parts(text, "README.md") if part[0].strip()]
    assert figures.figures(first) == {"0.400", "1.58", "3.53"}
    assert named == {"mine"}
    assert all(figures.has("mine", figure) for figure in figures.figures(first))
    assert not figures.has("mine", "0.401")
    assert figures.figures(second) == {"0.400"}
    assert none == set()
