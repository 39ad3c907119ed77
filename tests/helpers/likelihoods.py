"""Comparing answers to requests: log-likelihoods, and whether greedy decoding gives the same."""

from __future__ import annotations

import numpy as np


def close(found, expected):
    assert [g for _, g in found] == [g for _, g in expected]
    np.testing.assert_allclose([n for n, _ in found], [n for n, _ in expected], rtol=1e-4, atol=1e-4)
