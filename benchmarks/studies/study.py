"""Holds what a study is made of: a suite, its model and texts, and where the results go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from resting.benchmarks import again, cache, provenance
from resting.benchmarks.assets import models
from resting.benchmarks.assets.models import ModelSource
from resting.benchmarks.cells import code, expand
from resting.benchmarks.cells.cell import Cell
from resting.benchmarks.cells.options import one_model
from resting.benchmarks.cells.suite import Suite
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.names import of_weights, short, slug
from resting.benchmarks.quality import fits
from resting.benchmarks.quality.loaded_model import LoadedModel
from resting.benchmarks.sweep import output
from resting.sparsifier import OnProgress, Statistic
from resting.sparsifier.quantised.formats import AS_IS


@dataclass(frozen=True)
class Study:
    """Holds a suite whose methods are looked into, on one model.

    Attributes
    ----------
    suite : Suite
    source : ModelSource
    output : Path
    device : str
    """

    suite: Suite
    source: ModelSource
    output: Path
    device: str = "cpu"
    model: str | None = None
    """Put in the place of the suite's."""

    @classmethod
    def of(cls, suite: Suite, model: str | None, output: Path, device: str, trusted: bool = False) -> Study:
        """Resolve the model, and make a study of it."""
        if suite.weights != [AS_IS]:
            raise SuiteError(f"weights {', '.join(suite.weights)}: a study looks into weights as they are")
        source = models.resolve(one_model(suite, model), trusted=trusted)
        fits.check(suite, source)
        return cls(suite, source, output, device, model)

    @property
    def title(self) -> str:
        return f"{self.source.name}, {self.suite.dtype}"

    def cells(self) -> list[Cell]:
        """Return the cells of the suite under its own token policy."""
        return [c for c in expand.cells_of(self.suite) if str(c.policy) == str(self.suite.tokens.build())]

    def loaded(self, on_progress: OnProgress) -> LoadedModel:
        """Return the model of the suite; plans that were fitted on it are taken from the cache."""
        provenance.checkout()
        needs = frozenset[Statistic]().union(*(cell.sparsifier.needs for cell in self.cells()))
        return LoadedModel(self.suite, self.source, self.device, on_progress, needs)

    def check_output(self, name: str) -> None:
        """Refuse a folder that cannot be written to, or holds the study of another model.

        Raises
        ------
        BenchmarkError
        """
        output.check(
            self._path(name), self.suite.name, {of_weights(self.source.sha256): self.source.name}, self.suite.dtype
        )

    def _path(self, name: str) -> Path:
        own = None if name == self.suite.name else name  # a suite that is there for one study
        parts = (self.suite.name, slug(short(self.source.name)) if self.model else None, own)
        return self.output / "-".join(part for part in parts if part)

    def folder(self, name: str) -> Path:
        folder = self._path(name)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def write(study: Study, name: str, title: str, parts: list[str], frame: pd.DataFrame) -> Path:
    """Write README.md, results.csv and provenance.json of the study `name` beside its plots."""
    code.check_unchanged()
    folder = study.folder(name)
    facts = provenance.collect(study.device)
    cache.write_whole(folder / "results.csv", frame.to_csv(index=False, float_format="%.7g"))
    model = {"name": study.source.name, "sha256": study.source.sha256}
    about = {"suite": study.suite.model_dump(), "study": name, "model": model, "measured_on": facts}
    last = f"Model: {study.title}. Again: `{again.command(about, folder.name)}`."
    cache.write_whole(folder / "provenance.json", cache.as_json(about, 1) + "\n")
    cache.write_whole(folder / "README.md", "\n\n".join([f"# {title}", *parts, last]) + "\n")
    return folder
