"""Models that a step serves."""

from __future__ import annotations

import pytest
import torch
from plain_step import tiny
from served import FAMILIES


@pytest.fixture(scope="module")
def models():
    return {family: tiny(family) for family in FAMILIES}


@pytest.fixture
def llama(models):
    return models["llama"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield
