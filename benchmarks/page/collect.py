"""Reads everything that stands under a folder of results into one shape."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks import again
from resting.benchmarks.errors import BenchmarkError, first_line
from resting.benchmarks.names import RANDOM, with_weights
from resting.benchmarks.report.compared import from_codes
from resting.benchmarks.report.folder import NUMBERED, SUBMISSION, read_facts, read_results, read_singles, read_table
from resting.benchmarks.report.speedups import timed_in

KEYS = ["model", "method", "metric", "tokens", "dtype", "target", "seed"]
NUMBERS = ["byte_sparsity", "value", "stderr", "n", "difference", "difference_low", "difference_high"]
COLUMNS = [*KEYS, *NUMBERS, "reason", "weights"]
"""Columns of `Folder.rows`, which has one row per number."""
TIMES = (
    *("speedup", "share", "limit", "tokens_per_second", "sparse_p20", "sparse_p50", "sparse_p99", "dense_p20"),
    *("dense_p50", "dense_p99", "bytes_per_token", "bandwidth", "prefill_sparse", "prefill_dense", "over_base"),
)
"""Columns of decode.csv that are measurements."""
KERNEL_TIMES = ("speedup", "share", "over_linear", "seconds", "bandwidth")
"""Columns of matrices.csv that are measurements."""
CODE_TIMES = ("speedup", "over_plain", "share", "seconds", "bandwidth")
"""Columns of quantised.csv that are measurements."""


@dataclass
class Folder:
    """Holds one folder of results.

    Attributes
    ----------
    path : Path
    name : str
        Its path under the folder of results.
    facts : dict
        Its provenance.json.
    machines : list of dict
        What its numbers were measured on; `cells` hold places in it.
    rows : DataFrame
        With `COLUMNS`, one row per number; empty for a study.
    table : DataFrame or None
        What a study wrote, as it is.
    singles : DataFrame or None
        Single windows or items.
    decoded : DataFrame or None
        decode.csv as it is.
    windows : DataFrame or None
        windows.parquet as it is.
    """

    path: Path
    name: str
    facts: dict[str, Any]
    machines: list[dict[str, Any]]
    rows: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=COLUMNS))
    table: pd.DataFrame | None = None
    singles: pd.DataFrame | None = None
    decoded: pd.DataFrame | None = None
    windows: pd.DataFrame | None = None

    @property
    def weights(self) -> dict[str, str]:
        """Return the weights of its models by name, where they are known."""
        if self.decoded is not None:
            return {} if "weights" not in self.decoded else _known_weights(self.decoded)
        return _known_weights(self.rows)

    @property
    def suite(self) -> dict[str, Any]:
        """Return the suite as it was run."""
        return dict(self.facts["suite"])

    @property
    def submitted(self) -> dict[str, Any]:
        """Return what `resting submit` wrote of who sent it in; nothing for results of this project."""
        file = self.path / SUBMISSION
        if not file.exists():
            return {}
        try:
            return dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise BenchmarkError(f"{file} is not what `resting submit` writes: {first_line(error)}") from error

    @property
    def again(self) -> str:
        """Spell the command that measures it again."""
        command = again.command(self.facts | {"study": self._study}, self.path.name)
        parent = Path(self.name).parent
        return command if parent == Path() else f"{command} --output results/{parent.as_posix()}"

    @property
    def _study(self) -> str:
        """Name the study, if it is one; folders of earlier versions, which do not say it, end in it."""
        if self.table is None:
            return ""
        return str(self.facts.get("study") or self.path.name.removeprefix(f"{self.suite['name']}-"))


def folders(root: Path) -> list[Folder]:
    """Read all folders under `root` that hold results.csv or decode.csv.

    Raises
    ------
    BenchmarkError
        If there is none, or one cannot be read; the message names the file.
    """
    found = sorted({file.parent for name in ("results.csv", "decode.csv") for file in root.rglob(name)})
    # A folder whose name ends so is being written by a run.
    found = [path for path in found if not any(part.endswith(".partial") for part in path.relative_to(root).parts)]
    if not found:
        raise BenchmarkError(f"no results under {root}: neither results.csv nor decode.csv; `resting run` writes them")
    read = [_folder(path, root) for path in found]
    _tell_models_apart(read)
    return read


def _tell_models_apart(found: list[Folder]) -> None:
    """Add their hash to the names of models that stand for other weights in another folder."""
    known: dict[str, set[str]] = {}
    for folder in found:
        for name, weights in folder.weights.items():
            known.setdefault(name, set()).add(weights)
    for folder in found:
        new = {n: with_weights(n, weights) for n, weights in folder.weights.items() if len(known[n]) > 1}
        if not new:
            continue
        for frame in (folder.rows, folder.singles, folder.decoded, folder.windows):
            if frame is not None:
                frame["model"] = frame.model.replace(new)
        for one in folder.facts.get("cells", []):
            one["model"] = new.get(one.get("model"), one.get("model"))
        for one in folder.facts.get("models", []):
            one["name"] = new.get(one.get("name"), one.get("name"))


def _folder(path: Path, root: Path) -> Folder:
    facts = read_facts(path)
    machines = _machines(facts, path / "provenance.json")
    folder = Folder(path, path.relative_to(root).as_posix(), facts, machines)
    parts = []
    results, decode, matrices = (path / name for name in ("results.csv", "decode.csv", "matrices.csv"))
    if results.exists() and "cells" in facts:
        parts.append(_measured(read_results(path, may_be_empty=True), results))
    elif results.exists():  # a study has a table of its own kind
        folder.table = read_table(results, needed=(), may_be_empty=True)
    if decode.exists():
        folder.decoded = read_table(decode, may_be_empty=True)
        parts.append(_decoded(folder.decoded, decode, machines[0]))
        if matrices.exists():
            parts.append(_kernels(read_table(matrices, may_be_empty=True), matrices, machines[0]))
        if (codes := path / from_codes.FILE).exists():
            parts.append(_codes(read_table(codes, from_codes.NEEDED), codes, machines[0]))
    parts = [part for part in parts if not part.empty]
    if parts:
        folder.rows = pd.concat([part.dropna(axis=1, how="all") for part in parts]).reindex(columns=COLUMNS)
        folder.rows = folder.rows.reset_index(drop=True)
    folder.singles = _singles(path)
    if (path / "windows.parquet").exists():
        folder.windows = read_singles(path / "windows.parquet")
    return folder


def _machines(facts: dict[str, Any], file: Path) -> list[dict[str, Any]]:
    """The machines that `facts` name, where they and the cells are what the page reads."""
    try:
        machines = facts["machines"] if "machines" in facts else facts["measured_on"]
        machines = machines if isinstance(machines, list) else [machines]
        for machine in machines:
            machine["git"]["commit"], machine["packages"].items()
        for cell in facts.get("cells", []):
            cell["method"], cell["target"], "measured_on" not in cell or machines[cell["measured_on"]]
        facts["suite"]["name"], facts["suite"]["title"]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise BenchmarkError(f"{file} is not what a run writes: {error!r} is missing or wrong") from error
    return list(machines)


def _known_weights(frame: pd.DataFrame) -> dict[str, str]:
    kept = frame[frame.weights.notna() & (frame.weights != RANDOM)].drop_duplicates("model")
    return dict(zip(kept.model, kept.weights.astype(str)))


def _numeric(frame: pd.DataFrame, file: Path) -> pd.DataFrame:
    for name in [name for name in ("target", *NUMBERS) if name in frame]:
        try:
            frame[name] = pd.to_numeric(frame[name])
        except (ValueError, TypeError) as error:
            raise BenchmarkError(f"{file}, column {name}: {error}") from error
    if frame.target.isna().any():
        raise BenchmarkError(f"{file}: row {int(frame.target.isna().argmax()) + 2} has no target")
    return frame


def _measured(frame: pd.DataFrame, file: Path) -> pd.DataFrame:
    return _numeric(frame.reindex(columns=COLUMNS), file)


def _decoded(frame: pd.DataFrame, file: Path, machine: dict[str, Any]) -> pd.DataFrame:
    """The times of decode.csv, one row per number."""
    frame = frame.copy()
    frame["dtype"] = [timed_in(*pair, machine) for pair in zip(frame.dtype, frame.threads)]
    return _long(frame, [name for name in TIMES if name in frame], "decode", file)


def _kernels(frame: pd.DataFrame, file: Path, machine: dict[str, Any]) -> pd.DataFrame:
    """The times of matrices.csv, one row per number: a matrix is a model, a kernel a method."""
    frame["dtype"] = [timed_in(*pair, machine) for pair in zip(frame.dtype, frame.threads)]
    frame["model"] = [f"matrix {name}" for name in frame.matrix]
    # What is given to a kernel is exactly what it does not read.
    given = {"target": frame.sparsity, "byte_sparsity": frame.sparsity}
    frame = frame.rename(columns={"kernel": "method"}).assign(**given)
    return _long(frame, [name for name in KERNEL_TIMES if name in frame], "kernel", file)


def _codes(frame: pd.DataFrame, file: Path, machine: dict[str, Any]) -> pd.DataFrame:
    """The times of quantised.csv, one row per number: a matrix in a format is a model, a kernel a method.

    A format without a kernel has its reason under `codes`, with nothing at rest.
    """
    named = [f"matrix {matrix} ({form})" for matrix, form in zip(frame.matrix, frame.weights)]
    rests = frame.sparsity.fillna(0.0) if "sparsity" in frame else pd.Series(0.0, index=frame.index)
    kernel = frame.kernel.fillna("codes") if "kernel" in frame else "codes"
    frame = frame.drop(columns="weights").assign(model=named, method=kernel, target=rests, byte_sparsity=rests)
    frame["dtype"] = [timed_in(*pair, machine) for pair in zip(frame.dtype, frame.threads)]
    return _long(frame, [name for name in CODE_TIMES if name in frame], "codes", file)


def _long(frame: pd.DataFrame, names: list[str], prefix: str, file: Path) -> pd.DataFrame:
    kept = [
        name for name in ("model", "weights", "method", "dtype", "target", "byte_sparsity", "reason") if name in frame
    ]
    parts = [frame[kept].assign(metric=f"{prefix}/{name}", value=frame[name]) for name in names]
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    long = pd.concat(parts).reindex(columns=COLUMNS)
    long["tokens"] = "one at a time"
    # A method that was not measured has one reason, and not one for every number that it lacks.
    wanted = long.value.notna() | (long.reason.notna() & (long.metric == f"{prefix}/{names[0]}"))
    return _numeric(long[wanted], file)


def _singles(path: Path) -> pd.DataFrame | None:
    """Windows and items, under the names that results.csv has; ``item`` tells them apart."""
    parts = []
    for name, number in NUMBERED.items():
        if not (path / name).exists():
            continue
        values = read_singles(path / name).rename(columns={number: "item"})
        if name == "windows.parquet":  # the log of a perplexity is the mean of these
            values["metric"] = values.metric.str.replace(r"_nll$", "_perplexity", regex=True)
        else:  # items of a perplexity are log-likelihoods
            values["value"] = values.value.where(~values.metric.str.contains("perplexity"), -values.value)
        parts.append(values)
    return pd.concat(parts) if parts else None
