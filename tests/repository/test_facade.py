"""`import resting`: every public name, each loaded when it is asked for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import resting
from resting import sparsifier
from resting.benchmarks.cells import registry
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


def test_decoding_comes_through_it():
    assert resting.decoding is decoding


@pytest.mark.parametrize("name", ["teal", "Nothing", "Tensor", "_private"])
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


def test_the_old_top_level_names_are_gone():
    code = "from importlib.util import find_spec as f; print([n for n in {} if f(n)])"
    assert quiet(code.format(["benchmarks", "method", "baselines", "sparsifier", "tests"])).strip() == "[]"
