"""What `import resting` hands out, and that it loads nothing before it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import resting
import resting.baselines
import resting.method
import resting.sparsifier
from resting.baselines.teal import Teal
from resting.sparsifier.decoding import decoding


@pytest.mark.parametrize("name", resting.sparsifier.__all__)
def test_the_interface_is_importable_from_here(name):
    assert getattr(resting, name) is getattr(resting.sparsifier, name)


def test_methods_and_decoding_are_importable_from_here():
    assert resting.Teal is Teal
    assert resting.decoding is decoding
    for absent in ("Nothing", "nothing", "low_rank_budget", "_method_modules_"):
        with pytest.raises(AttributeError, match=f"module 'resting' has no attribute '{absent}'"):
            getattr(resting, absent)


def test_nothing_is_loaded_before_it_is_asked_for():
    code = "import sys, resting; from resting import benchmarks; assert 'torch' not in sys.modules; resting.masked; "
    subprocess.run([sys.executable, "-c", code + "assert 'torch' in sys.modules"], check=True)


@pytest.mark.parametrize("package", [resting.baselines, resting.method], ids=lambda p: p.__name__)
def test_methods_import_the_interface_and_nothing_behind_it(package):
    for path in Path(package.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resting.sparsifier"):
                assert node.module == "resting.sparsifier", f"{path.name} imports from {node.module}"
                assert {alias.name for alias in node.names} <= set(resting.sparsifier.__all__), path.name


def test_the_base_class_is_small_and_alone():
    text = Path(resting.sparsifier.__path__[0], "base.py").read_text()
    assert len(text.splitlines()) <= 150
    assert [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)] == ["Sparsifier"]
