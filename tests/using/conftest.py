"""A folder with a model and a plan, in which commands run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import using


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(using.room(), tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path
