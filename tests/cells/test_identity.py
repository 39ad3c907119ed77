"""What moves a cell's key, and what does not."""

from __future__ import annotations

import ast
import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import tiny

from resting.benchmarks.assets import hub_texts, models
from resting.benchmarks.cells import expand, identity, registry, suite_file
from resting.benchmarks.errors import ModelError

PLUGIN = """
from resting import Rule, Sparsifier
from {helper} import share


class Leaning(Sparsifier):
    '''Magnitude thresholds at a share of the ratio.'''

    name = "leaning"

    def rule(self, site, statistics, ratio):
        return Rule(threshold=statistics[site].quantile(share() * ratio))
"""
HELPER = "def share():\n    return 0.9\n"
ROOT = Path(__file__).parents[2]
NOT_HASHED = {
    "cache",  # where things are kept
    # The hash of the documents that they read is in the key.
    *(f"documents.{name}" for name in ("files", "hub", "kept", "overlap", "rows", "spec")),
    "cells.literature",  # published figures, which stand beside numbers
    "cells.own_texts",  # puts that hash into the key
    "cells.text_names",
    "errors",  # what a failure says
    "provenance",  # of it only versions are read, which are in the key
    "cells.code",  # refuses a change of the code
    "cells.cell",  # what a row is called
    "cells.identity",  # the key itself
    "cells.suite",  # the suite's settings are in the key, value by value
    "cells.registry",
}
"""Modules of the harness that what measures imports, and that determine no number."""


def measured_by() -> set[str]:
    """Modules of the project that `quality` imports, directly or not."""
    found, waiting = set(), [f"resting.benchmarks.quality.{name}" for name in ("measure", "plans", "tasks.lm")]
    while waiting:
        module = waiting.pop()
        if module in found:
            continue
        found.add(module)
        for node in ast.walk(ast.parse(Path(importlib.import_module(module).__file__).read_text())):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("resting."):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [name for name in names if importlib.util.find_spec(name.rpartition(".")[0]) and is_module(name)]
    return found


def is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_what_measures_imports_nothing_that_is_not_hashed():
    hashed = {file.resolve() for file in (identity.measuring_code() | identity.task_code()).values()}
    outside = set()
    for module in measured_by():
        file = Path(importlib.import_module(module).__file__).resolve()
        if file not in hashed and file.name != "__init__.py":
            outside.add(module.removeprefix("resting.benchmarks."))
    assert outside <= NOT_HASHED


def test_the_hashed_code_is_said_by_folder():
    names = identity.measuring_code()
    assert {name.split("/")[0] for name in names} == {"sparsifier", "quality", "assets"}
    assert not [name for name in names if name.startswith(("sparsifier/decoding/", "quality/tasks/"))]
    assert {"sparsifier/masking.py", "quality/perplexity.py", "assets/hub_texts.py", "assets/gguf.py"} <= set(names)


@pytest.fixture
def code(tmp_path) -> Path:
    """A copy of a hashed file."""
    return Path(shutil.copy(identity.measuring_code()["quality/perplexity.py"], tmp_path / "perplexity.py"))


@pytest.mark.parametrize(
    ("old", "new", "moves"),
    [
        ("    return total\n", "    return total  # a comment\n", False),
        ('"""Return mean and standard error', '"""Another docstring', False),
        ('"""Tokens whose logits are in memory at a time on a CPU."""', '"""What is said of a constant."""', False),
        ("CHUNK = 128", "CHUNK = 64", True),
        ("log_p - log_q)).sum(-1)", "log_p - log_q)).mean(-1)", True),
    ],
)
def test_a_comment_moves_no_key_and_a_formula_does(code, old, new, moves):
    before = identity.digest({"quality/perplexity.py": code})
    text = code.read_text()
    assert old in text
    code.write_text(text.replace(old, new))
    assert (identity.digest({"quality/perplexity.py": code}) != before) == moves


def test_a_room_that_moves_leaves_keys_as_they_are(code, tmp_path):
    before = identity.digest({"quality/perplexity.py": code})
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.move(code, tmp_path / "elsewhere" / "other.py"))
    assert identity.digest({"quality/perplexity.py": moved}) == before


def test_reports_plots_and_the_command_line_are_not_hashed():
    cell = expand.cells_of(suite_file.load("smoke"))[1]
    files = identity.measuring_code() | identity.task_code() | identity.method_code(cell.sparsifier)
    rooms = {ROOT / "benchmarks" / room for room in ("report", "cli", "sweep", "latency", "checks", "studies")}
    assert not [file for file in files.values() if rooms & set(file.resolve().parents)]


@pytest.mark.parametrize("layout", ["beside", "package", "relative"])
def test_a_helper_that_a_plug_in_s_method_imports_is_a_part_of_it(tmp_path, monkeypatch, layout):
    name = f"leaning_{layout}"
    folder = tmp_path if layout == "beside" else tmp_path / name
    helper = {"beside": f"helper_of_{name}", "package": f"{name}.helper", "relative": ".helper"}[layout]
    folder.mkdir(exist_ok=True)
    (folder / "unrelated.py").write_text("X = 1\n")
    if layout == "beside":
        (folder / f"{name}.py").write_text(PLUGIN.format(helper=helper))
        (folder / f"{helper}.py").write_text(HELPER)
    else:
        (folder / "__init__.py").write_text("")
        (folder / "method.py").write_text(PLUGIN.format(helper=helper))
        (folder / "helper.py").write_text(HELPER)
    monkeypatch.syspath_prepend(tmp_path)
    module = name if layout == "beside" else f"{name}.method"
    method = registry.load_class(f"{module}:Leaning")(target=0.5)
    file = folder / (f"{helper}.py" if layout == "beside" else "helper.py")
    before = identity.digest(identity.method_code(method))
    file.write_text(HELPER + "# a comment\n")
    assert identity.digest(identity.method_code(method)) == before
    (folder / "unrelated.py").write_text("X = 2\n")
    assert identity.digest(identity.method_code(method)) == before
    file.write_text(HELPER.replace("0.9", "0.8"))
    assert identity.digest(identity.method_code(method)) != before
    for loaded in [m for m in sys.modules if m.startswith((name, f"helper_of_{name}"))]:
        del sys.modules[loaded]


def test_an_own_method_is_its_file_with_what_it_imports():
    names = set(identity.method_code(registry.build("spon(wina)", 0.5)))
    assert {"resting.method.spontaneous", "resting.method.training", "resting.baselines.wina"} <= names
    assert "resting.baselines.teal" in names  # which WINA derives from
    assert "resting.baselines.cats" not in names


@pytest.mark.parametrize(
    "name",
    [
        *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json"),
        *("merges.txt", "special_tokens_map.json", "added_tokens.json", "spiece.model", "chat_template.jinja"),
    ],
)
def test_every_file_that_decides_what_is_computed_is_in_the_key(tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(tiny.once("model", tiny.model_folder), folder)
    file = folder / name
    if not file.exists():
        file.write_text("{}" if name.endswith(".json") else "a b\n")
    before = models.resolve(str(folder)).sha256
    (folder / "README.md").write_text("what a page says of a model changes nothing")
    assert models.resolve(str(folder)).sha256 == before
    if name == "config.json":
        file.write_text(json.dumps(json.loads(file.read_text()) | {"rope_theta": 5.0}))
    else:
        file.write_bytes(file.read_bytes() + b"\n")
    assert models.resolve(str(folder)).sha256 != before


def test_swapped_files_are_another_model(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.once("model", tiny.model_folder), folder)
    (folder / "merges.txt").write_text("a\n")
    (folder / "vocab.txt").write_text("b\n")
    before = models.resolve(str(folder)).sha256
    (folder / "merges.txt").write_text("b\n")
    (folder / "vocab.txt").write_text("a\n")
    assert models.resolve(str(folder)).sha256 != before


def test_code_is_a_part_of_a_model_only_where_it_is_trusted(tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny.once("model", tiny.model_folder), folder)
    before = models.resolve(str(folder)).sha256, models.resolve(str(folder), trusted=True).sha256
    (folder / "modeling_mine.py").write_text("X = 1\n")
    assert models.resolve(str(folder)).sha256 == before[0]
    assert models.resolve(str(folder), trusted=True).sha256 != before[1]
    config = json.loads((folder / "config.json").read_text()) | {"auto_map": {"AutoConfig": "modeling_mine.X"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="--trust-remote-code"):
        models.resolve(str(folder))


def test_texts_of_the_hub_are_pinned():
    assert all(len(text.revision) == 40 for text in hub_texts.TEXTS.values())
