"""The page of the committed example, built once."""

from __future__ import annotations

import pytest
from page_folder import RESULTS, embedded

from resting.benchmarks.page import build


@pytest.fixture(scope="session")
def page():
    return build.render(RESULTS)


@pytest.fixture(scope="session")
def data(page):
    return embedded(page)
