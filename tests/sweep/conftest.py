"""A folder to run in, with two models."""

from __future__ import annotations

import pytest
import tiny
from families import build
from two_models import saved


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two models called ``model``, and a suite."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RESTING_CACHE", str(tmp_path / "cache"))
    tiny.provide_texts(monkeypatch)
    (tmp_path / "mine.toml").write_text(tiny.SUITE)
    for number, parent in enumerate("ab"):
        saved(build("llama", seed=number), tmp_path / parent / "model")
    return tmp_path
