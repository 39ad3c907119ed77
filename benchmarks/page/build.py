"""Builds one HTML file of all results: data as compact JSON, style and script inside it, nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
import math
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from resting.benchmarks import cache
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.page import boards, collect, marks, methods, tasks
from resting.benchmarks.provenance import version
from resting.benchmarks.quality import intervals
from resting.benchmarks.report.style import BROKEN
from resting.benchmarks.report.table import shown_target

SCRIPTS = ("core.js", "export.js", "picture.js", "best.js", "table.js", "tasks.js", "details.js", "page.js")
CODED = ("model", "weights", "method", "metric", "tokens", "dtype", "reason")
"""Columns whose strings are kept once, the rows holding their places."""
OWN = {"tokens": "all-but-first-1"}
"""The token policy of these suites themselves, not of the further ones."""
HERE = "../"
"""From results/index.html to the root of the repository."""
VIEWS = [
    ("Perplexity", {"suite": "baselines", "metric": "wikitext2_perplexity"} | OWN),
    ("Perplexity, more text", {"suite": "baselines-wide", "metric": "wikitext2_perplexity"} | OWN),
    ("Fidelity (KL)", {"suite": "baselines-wide", "metric": "wikipedia_kl"} | OWN),
    ("Tasks", {"suite": "tasks", "metric": "arc_easy/acc"}),
    ("Decode speed", {"suite": "latency", "metric": "decode/speedup"}),
    ("Kernels", {"suite": "latency", "metric": "kernel/speedup"}),
    ("Kernels from codes", {"suite": "bytes-latency", "metric": "codes/speedup"}),
]
"""Views that the page offers where their rows exist; the first is shown first."""


def write(root: Path, repository: str = HERE) -> Path:
    """Write ``index.html`` into `root`, from all results under it.

    Parameters
    ----------
    root : Path
    repository : str
        What a path in the repository stands behind in links to code; by default that of a checkout.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    BenchmarkError
        If there are no results, or a file of them cannot be read.
    """
    if not root.is_dir():
        raise BenchmarkError(f"{root} is not a folder")
    file = root / "index.html"
    cache.write_whole(file, render(root, repository))
    return file


def render(root: Path, repository: str = HERE) -> str:
    """Build the page of the results under `root`."""
    folders = collect.folders(root)
    data = _data(folders, repository)
    script = '"use strict";\n(() => {\n' + "\n".join(_asset(name) for name in SCRIPTS) + "\n})();\n"
    style = _asset("page.css")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return page.from_string(_asset("page.html.j2")).render(
        data=data,
        folders=data["folders"],
        machines=data["machines"],
        script=Markup(script),
        style=Markup(style),
        # Nothing but these two may act, whatever a name in the data holds, and nothing may be fetched.
        policy=f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:",
        ceiling=f"{BROKEN:g}",
        repository=repository,
        version=version("resting-neurons") or "",
        agree=f"{boards.AGREE:g}",
        resamples=f"{intervals.RESAMPLES:,}",
    )


def _asset(name: str) -> str:
    return (resources.files("resting.benchmarks.page") / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _data(folders: list[collect.Folder], repository: str) -> dict[str, Any]:
    by_name = {folder.name: marks.add(folder) for folder in folders}
    machines: list[dict[str, Any]] = []
    about, parts, studies = [], [], []
    for place, folder in enumerate(folders):
        places = [_place(machines, machine) for machine in folder.machines]
        rows = _with_cells(by_name[folder.name], folder, places)
        parts.append(rows.assign(folder=place))
        if folder.table is not None:
            columns = list(folder.table.columns)
            values = [_plain(folder.table[name]) for name in columns]
            studies.append({"folder": place, "columns": columns, "values": values})
        about.append(_about(folder, places, len(rows) if folder.table is None else len(folder.table)))
    rows = pd.concat([part for part in parts if not part.empty] or parts, ignore_index=True)
    labels = [m for m in dict.fromkeys(rows.method) if isinstance(m, str)]
    kernels = set(rows.method[rows.metric.astype(str).str.startswith(("kernel/", "codes/"))])
    metrics = [m for m in dict.fromkeys(rows.metric) if isinstance(m, str)]
    timed = boards.timings(folders)
    return {
        "folders": _finite(about),
        "machines": _finite(machines),
        "rows": _encoded(rows),
        "studies": studies,
        "boards": _finite(boards.boards(folders, timed)),
        "timed": _finite(timed),
        "tasks": _finite(tasks.tables(folders)),
        "methods": methods.about([m for m in labels if m not in kernels], repository),
        "ceiling": BROKEN,
        "looks": methods.looks(labels),
        "directions": {metric: marks.direction(metric) for metric in metrics},
        "views": _views(rows, [folder.name for folder in folders]),
        "targets": {f"{t:g}": shown_target(t) for t in sorted(rows.target.dropna().unique())},
    }


def _about(folder: collect.Folder, places: list[int], count: int) -> dict[str, Any]:
    facts = folder.facts
    models = facts.get("models", [facts["model"]] if "model" in facts else [])
    return {
        "name": folder.name,
        "title": folder.suite["title"],
        "description": " ".join(str(folder.suite.get("description", "")).split()),
        "count": count,
        "study": folder.table is not None,
        "readme": (folder.path / "README.md").exists(),
        "machines": places,
        "models": {str(model.get("name")): str(model.get("sha256")) for model in models},
        "assets": {name: str(digest) for name, digest in facts.get("assets", {}).items()},
        "again": folder.again,
        "submitted": folder.submitted,
    }


def _place(machines: list[dict[str, Any]], machine: dict[str, Any]) -> int:
    if machine not in machines:
        machines.append(machine)
    return machines.index(machine)


def _with_cells(rows: pd.DataFrame, folder: collect.Folder, places: list[int]) -> pd.DataFrame:
    """`rows` with ``machine``, and with the ``seconds`` that their cell took; -1 where it is not known which it was."""
    cells = {_key(cell): cell for cell in folder.facts.get("cells", [])}
    alone = places[0] if len(places) == 1 else -1
    machine, seconds = [], []
    for row in rows[["model", "method", "target", "seed", "tokens"]].to_dict("records"):
        cell = cells.get(_key(row)) or cells.get(_key({"method": row["method"], **_only(row, "target", "seed")}))
        machine.append(alone if cell is None or "measured_on" not in cell else places[cell["measured_on"]])
        seconds.append(np.nan if cell is None else cell.get("seconds", np.nan))
    return rows.assign(machine=machine, seconds=seconds)


def _only(row: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _key(of: dict[str, Any]) -> tuple[Any, ...]:
    return of.get("model"), of["method"], of["target"], of.get("seed"), of.get("tokens")


def _encoded(rows: pd.DataFrame) -> dict[str, Any]:
    """Columns in place of rows, and every string once."""
    out: dict[str, Any] = {"strings": {}, "columns": {}}
    for name in rows.columns:
        if name in CODED:
            codes, strings = pd.factorize(rows[name])
            out["strings"][name] = [str(s) for s in strings]
            out["columns"][name] = [int(c) for c in codes]
        else:
            out["columns"][name] = _plain(rows[name])
    return out


def _plain(column: pd.Series) -> list[Any]:
    return [_number(v) for v in column.tolist()]


def _number(value: Any) -> Any:
    """`value` as JSON has it: nothing for NaN, a word for an infinity, seven digits."""
    if value is None or value is pd.NA or isinstance(value, (bool, str)):
        return None if value is pd.NA else value
    if not isinstance(value, (float, np.floating)):
        return int(value) if isinstance(value, (int, np.integer)) else str(value)
    real = float(value)
    if math.isnan(real):
        return None
    if math.isinf(real):
        return "inf" if real > 0 else "-inf"
    return int(real) if real.is_integer() and abs(real) < 1e15 else float(f"{real:.7g}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    return _number(value)


def _views(rows: pd.DataFrame, names: list[str]) -> list[dict[str, Any]]:
    shown = rows.assign(suite=[names[place] for place in rows.folder])
    out = []
    for title, view in VIEWS:
        if np.logical_and.reduce([shown[key] == value for key, value in view.items()]).any():
            out.append({"title": title, "hash": view})
    return out
