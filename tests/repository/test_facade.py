"""`import resting`: every public name, each loaded when it is asked for."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import resting
from resting import baselines, method, sparsifier
from resting.benchmarks.cells import registry
from resting.benchmarks.fitting.fit import fit
from resting.sparsifier.decoding import decoding

ROOT = Path(__file__).parents[2]
OWN = {cls.__name__: cls for cls in registry.methods().values() if cls.__module__.startswith("resting.")}


@pytest.mark.parametrize("name", sorted(OWN))
def test_every_method_class_comes_through_it(name):
    assert getattr(resting, name) is OWN[name]
    assert f"import {name}\n" in (ROOT / "resting" / "__init__.py").read_text()  # for type checkers


@pytest.mark.parametrize("name", sparsifier.__all__)
def test_every_name_of_the_interface_comes_through_it(name):
    assert getattr(resting, name) is getattr(sparsifier, name)


def test_functions_come_through_it():
    assert resting.decoding is decoding
    assert resting.fit is fit


@pytest.mark.parametrize("name", ["teal", "Nothing", "nothing", "Tensor", "low_rank_budget", "_method_modules_"])
def test_what_it_has_not_is_an_attribute_error(name):
    with pytest.raises(AttributeError, match=f"module 'resting' has no attribute '{name}'"):
        getattr(resting, name)


def quiet(code: str) -> str:
    """What `code` prints in a process that has no path but its installation's."""
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("code", ["import resting", "from resting import benchmarks, method"])
def test_importing_it_alone_loads_nothing_heavy(code):
    heavy = {"torch", "transformers", "numpy", "numba", "pandas"}
    assert quiet(f"{code}; import sys; print(sorted({heavy} & set(sys.modules)))").strip() == "[]"


def test_a_name_of_the_interface_loads_it():
    assert quiet("import resting, sys; resting.masked; print('torch' in sys.modules)").strip() == "True"


def test_the_old_top_level_names_are_gone():
    """One of another package may be there: pyarrow 17 has a `benchmarks`."""
    names = ["benchmarks", "method", "baselines", "sparsifier", "tests"]
    found = quiet(f"from importlib.util import find_spec as f; print([str(s.origin) for n in {names} if (s := f(n))])")
    assert str(ROOT) not in found
    installed = packages_distributions()
    assert not [name for name in names if "resting-neurons" in installed.get(name, [])]


@pytest.mark.parametrize("package", [baselines, method], ids=lambda p: p.__name__)
def test_methods_import_the_interface_and_nothing_behind_it(package):
    for path in Path(package.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resting.sparsifier"):
                assert node.module == "resting.sparsifier", f"{path.name} imports from {node.module}"
                assert {alias.name for alias in node.names} <= set(sparsifier.__all__), path.name


def test_the_base_class_is_small_and_alone():
    text = Path(sparsifier.__path__[0], "base.py").read_text()
    assert len(text.splitlines()) <= 150
    assert [node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)] == ["Sparsifier"]
