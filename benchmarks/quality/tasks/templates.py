"""Spares lm-eval the compiling of a template for every document again: what it writes is the same."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache


@contextmanager
def compiled_once() -> Iterator[None]:
    """Compile each template of lm-eval's at its first use inside the ``with`` block alone."""
    from lm_eval.utils import env

    if "from_string" in vars(env):  # of a block around this one
        yield
        return
    env.from_string = lru_cache(maxsize=128)(env.from_string)
    try:
        yield
    finally:
        del env.from_string
