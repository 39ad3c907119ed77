"""The version, and files that begin with a byte order mark."""

from __future__ import annotations

import importlib.metadata

import pytest
import tiny

from resting.benchmarks.assets import wikitext2
from resting.benchmarks.cells import suite_file

BOM = b"\xef\xbb\xbf"


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    assert tiny.resting(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"resting-neurons {importlib.metadata.version('resting-neurons')}\n"


def test_a_suite_with_a_byte_order_mark_is_read(tmp_path):
    plain, marked = tmp_path / "plain.toml", tmp_path / "marked.toml"
    plain.write_text(tiny.SUITE)
    marked.write_bytes(BOM + tiny.SUITE.encode())
    assert suite_file.load(str(marked)) == suite_file.load(str(plain))


@pytest.mark.parametrize("start", [b"", BOM])
def test_a_text_with_a_byte_order_mark_is_the_same_text(tmp_path, monkeypatch, start):
    kept = []
    monkeypatch.setattr(wikitext2, "keep", lambda text, source: kept.append(text))
    (tmp_path / "text.txt").write_bytes(start + b"The text.\n")
    wikitext2.provide({"wikitext2": str(tmp_path / "text.txt")})
    assert kept == ["The text.\n"]
