"""Checks that a suite's numbers do not depend on who runs it, and what several workers gain.

    python benchmarks/micro/several_gpus.py baselines-wide --model FILE.gguf --workers 2,6

The suite is run in one process, by the executor with each number of workers, and once more with a worker that is killed
when the first cell is finished; a run that fails is named. Every run begins with an empty store; models, texts, their
tokens and packages are those of the cache. An untimed run of the dense model on four windows comes first and prepares
them.

Times are of the whole command, with the time that processes take to start, and from the first cell's beginning to the
last one's end. "Once loaded" leaves out the first cell of the one process and of every worker, which has the model, the
statistics and the dense model's logits in it: it is what one process took for the rest, over what the workers took. All
workers must begin before the first cell of one of them ends.

Rows that differ from those of one process are listed by method: on a GPU those of trained methods may, since the
derivative of attention is not added up in a fixed order. With `--twice` the one process runs twice: that shows how far.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from resting.benchmarks import cache

FRESH = ("cells", "cells-locks", "fits", "plans", "gpus", "jobs")
"""Folders of the cache that hold what is measured; the others are lent to every run."""
PATIENCE = 3600
"""Seconds after which a run without a finished cell is ended."""
MEASURED = ("value", "stderr", "byte_sparsity", "difference", "difference_low", "difference_high")


def prepared(folder: Path) -> dict[str, str]:
    """Make a cache without cells in `folder`, and return the environment that uses it."""
    folder.mkdir(parents=True)
    for name in cache.PARTS:
        (cache.root() / name).mkdir(parents=True, exist_ok=True)
    for entry in cache.root().iterdir():
        if entry.name not in FRESH:
            (folder / entry.name).symlink_to(entry)
    return os.environ | {"RESTING_CACHE": str(folder)}


def children(pid: int) -> list[int]:
    """Return the processes that `pid` started, after what it says of itself in /proc."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    threads = (Path(f"/proc/{pid}/task") / t / "children" for t in os.listdir(f"/proc/{pid}/task"))
    return sorted({int(child) for child in found} | {int(c) for t in threads for c in t.read_text().split()})


def workers_of(pid: int) -> list[int]:
    """Return the processes among them that run jobs."""
    return [c for c in children(pid) if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]


Times = dict[str, tuple[float, float]]
"""Begin and end of cells, by their files."""


def times(cells: Path) -> Times:
    """Return when the cells of a store began and ended."""
    ends = {file: file.stat().st_mtime for file in cells.glob("*.json")}
    return {file.name: (end - json.loads(file.read_text())["seconds"], end) for file, end in ends.items()}


def span(cells: Times) -> float:
    """Return the seconds from the beginning of the first cell to the end of the last."""
    return max(end for _, end in cells.values()) - min(begin for begin, _ in cells.values())


def once_loaded(alone: Times, cells: Times) -> float | None:
    """Return how many times as fast several workers were once all had loaded; None if nothing was left.

    Parameters
    ----------
    alone, cells : dict
        In one process, and by the workers. What one process ran first has its loading in it, and counts as a worker
        needed for it. A cell that was under way when the last worker had loaded counts by the share that was left.
    """
    first = min(end for _, end in cells.values())
    loaded = max(end for begin, end in cells.values() if begin < first)  # the first one of each worker
    loading = min(alone, key=lambda name: alone[name])
    left = 0.0
    for name, (begin, end) in cells.items():
        if end > loaded:
            here = end - begin
            there = here if name == loading else alone[name][1] - alone[name][0]
            left += there * (end - max(begin, loaded)) / here if here else there
    took = max(end for _, end in cells.values()) - loaded
    return left / took if took else None


class Failed(Exception):
    """A run ended with something else than 0."""


def run(command: list[str], folder: Path, kill: bool = False) -> tuple[Path, float, Times]:
    """Run a suite, and return its results file, the seconds that it took, and the times of its cells.

    Raises
    ------
    Failed
    """
    environment = prepared(folder / "cache")
    begin = time.monotonic()
    process = subprocess.Popen([*command, "--output", str(folder / "out")], env=environment, stdout=subprocess.DEVNULL)
    if kill:
        while process.poll() is None and not any((folder / "cache" / "cells").glob("*.json")):
            time.sleep(0.2)  # until the first cell is there
            if time.monotonic() - begin > PATIENCE:
                process.kill()
        try:
            victims = workers_of(process.pid)
        except OSError:  # it has ended
            victims = []
        if not victims:
            process.kill()
            raise Failed(f"no worker was running after the first cell; the command ended with {process.wait()}")
        print(f"killing worker {victims[-1]} of {victims} after the first cell", flush=True)
        os.kill(victims[-1], signal.SIGKILL)
    if process.wait():
        raise Failed(f"{' '.join(command)} ended with {process.returncode}")
    found = next((folder / "out").glob("*/results.csv"), None)
    if found is None:
        raise Failed(f"{' '.join(command)} wrote no results.csv")
    return found, time.monotonic() - begin, times(folder / "cache" / "cells")


def differences(one: Path, other: Path) -> Counter[str]:
    """Count the rows of each method in which two results files differ."""
    rows = [list(csv.DictReader(file.open(encoding="utf-8"))) for file in (one, other)]
    if len(rows[0]) != len(rows[1]):
        return Counter({"number of rows": abs(len(rows[0]) - len(rows[1]))})
    return Counter(a["method"] for a, b in zip(*rows) if a != b)


def largest(one: Path, other: Path) -> float:
    """Return the greatest relative distance of two values in them."""
    rows = [list(csv.DictReader(file.open(encoding="utf-8"))) for file in (one, other)]
    pairs = [(a[n], b[n]) for a, b in zip(*rows) for n in MEASURED if a.get(n) and b.get(n)]
    return max((abs(float(a) - float(b)) / max(abs(float(a)), 1e-9) for a, b in pairs), default=0.0)


def main() -> None:
    """Run, compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("suite")
    parser.add_argument("--workers", default="2", help="numbers with commas between them")
    parser.add_argument("--executors", default="processes", help="with commas; all but the first run the first number")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--twice", action="store_true")
    parser.add_argument("--no-kill", action="store_true")
    chosen, more = parser.parse_known_args()
    resting = [
        sys.executable,
        "-P",
        "-m",
        "resting.benchmarks.cli",
        "run",
        chosen.suite,
        "--device",
        chosen.device,
        *more,
    ]
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        try:
            run([*resting, "--methods", "dense", "--windows", "4"], base / "prepared")
        except Failed as error:
            print(f"nothing is prepared, which is in the time of the first run: {error}", flush=True)
        alone, took, cells = run(resting, base / "one")
        print(f"one process: {took:.1f} s, cells {span(cells):.1f} s", flush=True)
        runs: list[tuple[str, list[str], bool]] = [("one process again", [], False)] if chosen.twice else []
        counts = [int(number) for number in chosen.workers.split(",")]
        first, *others = chosen.executors.split(",")

        def spread(executor: str, count: int) -> list[str]:
            return ["--executor", executor, "--workers", str(count)]

        runs.append((f"{counts[0]} workers", spread(first, counts[0]), False))
        if not chosen.no_kill and first == "processes":
            runs.append((f"{counts[0]} workers, one killed", spread(first, counts[0]), True))
        runs += [(f"{counts[0]} workers of {name}", spread(name, counts[0]), False) for name in others]
        runs += [(f"{count} workers", spread(first, count), False) for count in counts[1:]]
        failed = False
        for number, (name, options, is_killed) in enumerate(runs):
            try:
                found, seconds, own = run([*resting, *options], base / str(number), is_killed)
            except Failed as error:
                failed = True
                print(f"{name}: {error}", flush=True)
                continue
            apart = differences(alone, found)
            same = "the same CSV" if not apart else f"{sum(apart.values())} rows differ ({dict(apart)}), "
            size = "" if not apart else f"by {largest(alone, found):.1e} at most"
            faster = f"{took / seconds:.2f} times as fast, cells {span(own):.1f} s, {span(cells) / span(own):.2f} times"
            loaded = None if is_killed else once_loaded(cells, own)
            faster += "" if loaded is None else f", once loaded {loaded:.2f} times"
            print(f"{name}: {seconds:.1f} s, {faster}; {same}{size}", flush=True)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
