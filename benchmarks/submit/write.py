"""Writes a folder of results/community: the results, who sent them in, and what was measured again."""

from __future__ import annotations

import json
import re
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resting.benchmarks import cache
from resting.benchmarks.errors import BenchmarkError
from resting.benchmarks.report import readme
from resting.benchmarks.report.folder import SUBMISSION
from resting.benchmarks.report.table import markdown
from resting.benchmarks.submit.check import Checked, check, unchanged

SCHEMA = 1


def check_name(name: str, by: str) -> None:
    """Check how results are named, before anything is measured.

    Raises
    ------
    BenchmarkError
        If `name` is no name of a folder, or nobody is named.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name):
        raise BenchmarkError(f"--name {name!r} is no name of a folder; allowed: lower-case letters, digits and hyphens")
    if not by.strip() or "\n" in by:
        raise BenchmarkError(f"--by {by!r} names nobody; allowed: a person or a group, in one line")


def check_home(root: Path, checked: Checked, name: str, overwrite: bool) -> Path:
    """Return the folder that results go into.

    Raises
    ------
    BenchmarkError
        If it is there already, and `overwrite` is not set.
    """
    home = root / "community" / name / checked.suite
    if home.exists() and not overwrite:
        raise BenchmarkError(f"{home} is there already; allowed: another --name, or --overwrite")
    return home


def write(folder: Path, home: Path, checked: Checked, by: str, verified: str, numbers: list[dict[str, Any]]) -> Path:
    """Copy `folder` to `home`, with its tables and plots, submission.json, and a README of all that `by` sent in.

    Parameters
    ----------
    folder, home : Path
    checked : Checked
    by : str
        Who measured it.
    verified : str
        What was measured again, in words; why nothing was, where nothing was.
    numbers : list of dict
        What was measured again, number by number.

    Returns
    -------
    Path
        `home`.
    """
    new = home.with_name(f"{home.name}.partial")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for name in checked.files:
        shutil.copyfile(folder / name, new / name)
    facts = {
        "schema": SCHEMA,
        "by": by.strip(),
        "suite": checked.suite,
        "sent_in": datetime.now(UTC).date().isoformat(),
        "commits": checked.commits,
        "machines": [_machine(machine) for machine in checked.machines],
        "checked": checked.said,
        "verified": verified,
        "measured_again": numbers,
        "files": checked.files,
    }
    cache.write_whole(new / SUBMISSION, cache.as_json(facts, 1) + "\n")
    readme.write(new)
    shutil.rmtree(home, ignore_errors=True)
    new.rename(home)
    _readme(home.parent)
    return home


def read(folder: Path) -> dict[str, Any]:
    """Read what was sent in, and check that it is as it was.

    Raises
    ------
    BenchmarkError
        If submission.json is missing or damaged, or a file is another one.
    """
    try:
        facts = dict(json.loads((folder / SUBMISSION).read_text(encoding="utf-8")))
        files, by = dict(facts["files"]), str(facts["by"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{folder}/{SUBMISSION} is not what `resting submit` writes: {error!r}") from None
    check_name(folder.parent.name, by)
    unchanged(folder, files)
    check(folder)
    return facts


def _machine(machine: dict[str, Any]) -> str:
    device = str(machine.get("device", "cpu"))
    processor = str(machine.get("cpu") or "a processor that is not known")
    return f"{processor}, {machine.get('cores')} cores" if device == "cpu" else f"{device} ({processor})"


def _readme(home: Path) -> None:
    """Write a README over all folders that one name has sent in."""
    lines = []
    for file in sorted(home.glob(f"*/{SUBMISSION}")):
        facts = json.loads(file.read_text(encoding="utf-8"))
        commits = ", ".join(f"`{commit[:12]}`" for commit in facts["commits"])
        link = f"[{file.parent.name}]({file.parent.name}/README.md)"
        lines.append([link, facts["by"], "; ".join(facts["machines"]), commits, facts["sent_in"], facts["verified"]])
    heads = ["results", "measured by", "machine", "commit", "sent in", "measured again"]
    text = f"# {home.name}\n\nResults of others than this project, as `resting submit` checked them.\n\n"
    cache.write_whole(home / "README.md", f"{text}{markdown(lines, heads)}\n")
