"""What the command line puts in place of a suite's own choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from resting.sparsifier import Sparsifier


@dataclass(frozen=True)
class Options:
    """What the command line adds to a suite file."""

    output: Path
    model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[type[Sparsifier], ...] = ()
