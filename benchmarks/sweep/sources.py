"""Tells the models of a run apart by name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.names import of_weights, with_weights


def told_apart(sources: Sequence[ModelSource]) -> list[ModelSource]:
    """Give every model of a run a name of its own: that of its parent folder before it, else its hash behind it.

    Raises
    ------
    SuiteError
        If two of them are the same weights under the same name.
    """
    for (name, weights), times in Counter((one.name, one.sha256) for one in sources).items():
        if times > 1:
            raise SuiteError(f"the model {name} (sha256 {of_weights(weights)}) is named {times} times; allowed: once")
    count = Counter(one.name for one in sources)
    by_folder = [_with_parent(one) if count[one.name] > 1 else one for one in sources]
    alike = Counter(one.name for one in by_folder)
    return [
        replace(one, name=with_weights(one.name, of_weights(one.sha256))) if alike[longer.name] > 1 else longer
        for one, longer in zip(sources, by_folder)
    ]


def _with_parent(source: ModelSource) -> ModelSource:
    """The model under its own folder's name and the one above; as it is where it is not named after its folder."""
    folder = source.folder.resolve()
    named = folder.name == source.name
    return replace(source, name=f"{folder.parent.name}/{source.name}") if named else source
