"""Keys are the same under every version of Python, so that finished cells move between machines."""

from __future__ import annotations

import ast
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from resting.benchmarks.cells import identity
from resting.sparsifier import AllButFirst

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""What a module is for."""
from __future__ import annotations

import a.b as c


class Method(Base, metaclass=Meta):
    """What a class is for."""

    name: str = "x"
    """What it is."""

    @property
    async def compute(self, /, x: int, *args, y=None, **more) -> None:
        text = f"{x!r:>{y}} and {{{y}}} {x=} {''}" f"{y}" "end"
        match x:
            case None | {"a": 1, **rest}:
                return
            case [1, *_] if y:
                raise ValueError(f"{x:.3f}") from None
        async with x as y, z:
            yield
        return [*args, {**more}, lambda: ..., -1e-3, b"b", u"u", None, x[1:, ::2], (i async for i in y if i)]


def function():
    try:
        del x
    except* OSError:
        global y
    finally:
        while True:
            break
'''
OF_SOURCE = "cbeddd34fa979c3005bb603dfe745d2df1e925a7bea84ccbb7d8ffd51f67da24"
OF_CELL = "e90fdcc387b2ba48789217fa2b277cd810a68952258db96cabd83324a91bd0e5"
"""As Python 3.11, 3.12 and 3.13 compute them."""


def test_code_has_one_digest_under_all_versions(tmp_path):
    file = tmp_path / "method.py"
    file.write_text(SOURCE)
    assert identity.digest({"method.py": file}) == OF_SOURCE
    file.write_text(SOURCE.replace("What", "That is what").replace("@property", "@property  # read once"))
    assert identity.digest({"method.py": file}) == OF_SOURCE  # without docstrings
    for before, after in (("None |", "True |"), ("-1e-3", "1e-3"), ("{x=}", "{y=}"), ("y=None", "y=1"), (":.3f", "")):
        assert before in SOURCE
        file.write_text(SOURCE.replace(before, after))
        assert identity.digest({"method.py": file}) != OF_SOURCE


def test_a_cell_has_one_key_under_all_versions(monkeypatch):
    """With the code, which is to move keys, left out."""
    monkeypatch.setattr(identity, "digest", lambda files: "code")
    monkeypatch.setattr(identity, "method_code", lambda method: {})
    method = SimpleNamespace(spec=lambda: {"name": "teal", "target": 0.5, "roles": ("q", "k"), "seed": None})
    cell = SimpleNamespace(policy=AllButFirst(1), config=SimpleNamespace(text=None), sparsifier=method)
    setting = {
        "model": "0" * 64,
        "device": "cuda",
        "packages": {"torch": "2.11.0"},
        "share": 0.1,
        "missing": ["papers"],
    }
    assert identity.cell_key(cell, setting) == OF_CELL
    other = {"device": "cuda", "model": "0" * 64, "missing": {"papers"}, "share": 0.1, "packages": {"torch": "2.11.0"}}
    assert identity.cell_key(cell, other) == OF_CELL  # whatever order a mapping or a set has


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the form is that of ast.dump in Python 3.11")
def test_keys_of_python_3_11_are_those_of_before():
    for file in sorted((ROOT / "benchmarks").rglob("*.py")):
        tree = ast.parse(file.read_bytes())
        assert identity.written(tree) == ast.dump(tree)
