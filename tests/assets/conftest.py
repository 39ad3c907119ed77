"""A tiny model in a folder."""

from __future__ import annotations

import pytest
import tiny


@pytest.fixture
def folder(tmp_path):
    return tiny.model_folder(tmp_path / "model")
