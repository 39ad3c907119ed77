"""Holds what the command line puts in place of a suite's own choices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import SuiteError
from resting.sparsifier import Sparsifier


@dataclass(frozen=True)
class Options:
    """Holds what the command line puts in place of the suite's own choices.

    Attributes
    ----------
    output : Path
        Folder of results folders.
    model : str, optional
    device : str
    dtype : str, optional
    texts : mapping of str to str
        Files by the name of the text that they hold: ``wikitext2``, or a text of the suite's own.
    methods : tuple of classes
        Sparsifiers from outside.
    trusted : bool
        Whether the code that a model's folder or hub page brings is run.
    """

    output: Path
    model: str | None = None
    device: str = "cpu"
    dtype: str | None = None
    texts: Mapping[str, str] = field(default_factory=dict)
    methods: tuple[type[Sparsifier], ...] = ()
    trusted: bool = False


def one_model(suite: Suite, asked: str | None) -> str:
    """Return the model that is `asked` for, or else the suite's, for what looks at one alone.

    Raises
    ------
    SuiteError
        If the suite has several, and none is asked for.
    """
    if asked is None and len(suite.models) > 1:
        raise SuiteError(
            f"suite {suite.name} has {len(suite.models)} models, and one is looked at; allowed: --model with one of "
            f"{', '.join(suite.models)}"
        )
    return asked or suite.models[0]
