"""Folders of results that `resting report` cannot show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import tiny

REPORT = ["report", "mine"]


def make(folder: Path) -> None:
    """Results of the tiny suite, and files that look like times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RESTING_CACHE", str(folder.parent / "cache-of-results"))
        tiny.provide_texts(patch)
        (folder.parent / "mine.toml").write_text(tiny.SUITE)
        model = tiny.once("model", tiny.model_folder)
        run = ["run", str(folder.parent / "mine.toml"), "--model", str(model), "--output", str(folder)]
        assert tiny.resting(patch, *run) == 0
    (folder / "mine-model").rename(folder / "mine")
    times = folder / "times"
    times.mkdir()
    (times / "provenance.json").write_text('{"suite": {}}')
    (times / "decode.csv").write_text("model,dtype,threads,method,target\n")
    (times / "matrices.csv").write_text("")


def changed(name: str, change: Callable[[Path], object], report: str = "mine") -> Callable[[Path], list[str]]:
    def act(folder: Path) -> list[str]:
        change(folder / "results" / report / name)
        return ["report", report]

    return act


def to(data: str | bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(data if isinstance(data, bytes) else data.encode())


def emptied(file: Path) -> None:
    """A folder of the file's name."""
    file.unlink()
    file.mkdir()


def without(column: str) -> Callable[[Path], object]:
    return lambda file: pd.read_csv(file).drop(columns=column).to_csv(file, index=False)


def facts(**values: object) -> Callable[[Path], object]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


AGAIN = "run `resting run mine` again"
RESULTS = {
    "none": (lambda folder: ["report", "other"], "no results in results/other: run `resting run other` first"),
    "a file": (lambda folder: ["report", "mine", "--output", "mine.toml"], "no results in mine.toml/mine: run"),
    "a folder that is not there": (lambda folder: ["report", "mine", "--output", "no"], "no results in no/mine: run"),
    "no facts": (
        changed("provenance.json", Path.unlink),
        "no results in results/mine: run `resting run mine` first (results/mine/provenance.json cannot be read: No",
    ),
    "facts that are no JSON": (changed("provenance.json", to("{")), "results/mine/provenance.json is not JSON"),
    "facts that are no text": (changed("provenance.json", to(b"\xff")), "results/mine/provenance.json is not JSON"),
    "facts that are a list": (
        changed("provenance.json", to("[]")),
        "provenance.json holds a list; allowed: a JSON object",
    ),
    "facts of an older version": (
        changed("provenance.json", to('{"suite": {}}')),
        "was written by an older version: run",
    ),
    "facts without a suite": (changed("provenance.json", facts(suite={})), "results that cannot be shown (KeyError"),
    "facts that are damaged": (changed("provenance.json", facts(models=3)), "results that cannot be shown (TypeError"),
    "no table": (
        changed("results.csv", Path.unlink),
        f"results.csv cannot be read (No such file or directory): {AGAIN}",
    ),
    "an empty table": (changed("results.csv", to("")), f"results/mine/results.csv is empty: {AGAIN}"),
    "a table that is a folder": (
        changed("results.csv", emptied),
        f"results.csv cannot be read (Is a directory): {AGAIN}",
    ),
    "a table that is no text": (
        changed("results.csv", to(b"\x00\xff\xfe" * 9)),
        "results/mine/results.csv is no CSV tab",
    ),
    "a table of other columns": (
        changed("results.csv", to("a,b\n1,2\n")),
        "results.csv has no column 'model'; it needs",
    ),
    "a table that lacks a column": (
        changed("results.csv", without("tokens")),
        "has no column 'tokens'; it needs model, ",
    ),
    "a table without rows": (
        changed("results.csv", lambda f: f.write_text(f.read_text().splitlines()[0])),
        "has no rows",
    ),
    "no windows": (changed("windows.parquet", Path.unlink), "results/mine/windows.parquet cannot be read"),
    "windows that are damaged": (
        changed("windows.parquet", to("PAR1")),
        "results/mine/windows.parquet cannot be read",
    ),
    "windows of other columns": (
        changed("windows.parquet", lambda f: pd.read_parquet(f).drop(columns="tokens").to_parquet(f)),
        "windows.parquet has no column 'tokens'; it needs model, ",
    ),
    "times without facts": (
        changed("provenance.json", Path.unlink, "times"),
        "no results in results/times: run `resting",
    ),
    "times whose facts are no JSON": (
        changed("provenance.json", to("{"), "times"),
        "times/provenance.json is not JSON",
    ),
    "times whose facts are others": (changed("decode.csv", to(""), "times"), "results that cannot be shown (KeyError"),
    "times without a table of matrices": (
        changed("matrices.csv", Path.unlink, "times"),
        "results/times/matrices.csv cannot be read (No such file or directory): run `resting run times` again",
    ),
    "times of other columns": (
        changed("decode.csv", to("a\n1\n"), "times"),
        "decode.csv has no column 'model'; it needs",
    ),
}
