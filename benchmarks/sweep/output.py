"""Makes sure, before anything is measured, that results can be written and replace no others."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pandas as pd

from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.names import ACROSS, of_weights


def check(
    folder: Path, suite: str, weights: Mapping[str, str], dtype: str, changed: Mapping[str, Any] | None = None
) -> None:
    """Refuse a folder that cannot be written to, or that holds results of other weights, another dtype or suite.

    Parameters
    ----------
    folder : Path
    suite : str
    weights : mapping of str to str
        Names of all models of the run, by their weights (`names.of_weights`).
    dtype : str
    changed : mapping, optional
        What the command line put in place of the suite's own choices (`Suite.changed`): with other ones it is another
        suite, though ``--name`` may call both alike.

    Raises
    ------
    BenchmarkError
    """
    check_writable(folder)
    if (folder / ACROSS).exists():
        raise BenchmarkError(
            f"{folder} sets other results side by side ({ACROSS}), and its README.md would be replaced; give another "
            "--output, or the model by --model, which the folder is then named after"
        )
    there, mine = _held(folder), {"suite": {suite: ""}, "weights": weights, "dtype": {dtype: ""}}
    for what, wanted in mine.items():
        if others := {key: name for key, name in there[what].items() if key not in wanted}:
            raise BenchmarkError(
                f"{folder} holds results of the {what} {_shown(others)}, and this run is of {_shown(wanted)}: they "
                "would be replaced; give another --output, or delete that folder"
            )
    held = _changed(folder)
    if changed is not None and held is not None and held != dict(changed):
        raise BenchmarkError(
            f"{folder} holds results of the suite {suite} with other choices ({_choices(held)}), and this run has "
            f"{_choices(changed)}: they would be replaced; give another --name or --output, or delete that folder"
        )


def _changed(folder: Path) -> dict[str, Any] | None:
    """What was put in place of the choices of the suite in a folder; None where it does not say."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return dict(json.loads((folder / "provenance.json").read_text(encoding="utf-8-sig"))["suite"]["changed"])
    return None


def _choices(changed: Mapping[str, Any]) -> str:
    made = changed.get("choices", {})
    said = "; ".join(
        f"{key}: {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in made.items()
    )
    return said or "none on the command line"


def _shown(named: Mapping[str, str]) -> str:
    return ", ".join(f"{key} ({name})" if name else key for key, name in named.items())


def _held(folder: Path) -> dict[str, dict[str, str]]:
    """What the results in a folder are of, weights with their model; nothing of what is damaged, which a run mends."""
    held: dict[str, dict[str, str]] = {"suite": {}, "weights": {}, "dtype": {}}
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = json.loads((folder / "provenance.json").read_text(encoding="utf-8-sig"))
        held["suite"][str(facts["suite"]["name"])] = ""
        held["dtype"][str(facts["suite"]["dtype"])] = ""
        models = facts["models"] if "models" in facts else [facts["model"]]
        held["weights"] |= {of_weights(model["sha256"]): str(model["name"]) for model in models}
    with suppress(OSError, ValueError):
        rows = pd.read_csv(folder / "results.csv", dtype={"weights": str})
        for what in ("suite", "dtype"):
            held[what] |= dict.fromkeys(map(str, rows[what].dropna() if what in rows else ()), "")
        if "weights" in rows:
            held["weights"] = dict(zip(rows.weights.dropna(), rows.model)) | held["weights"]
    return held


def check_writable(folder: Path) -> None:
    """Refuse what results cannot be written to.

    Raises
    ------
    BenchmarkError
    """
    there = next(part for part in (folder, *folder.absolute().parents) if os.path.lexists(part))
    refused = f"--output: {there} is no folder that can be written to, which {folder} needs"
    if not there.is_dir():
        raise BenchmarkError(refused)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise BenchmarkError(f"{refused} ({error.strerror})") from error
    for name in ("results.csv", "provenance.json", "README.md", "decode.csv", "matrices.csv"):
        file = folder / name
        if file.is_dir():
            raise BenchmarkError(f"--output: {file} is a folder where a file belongs: move it away")
