"""Small folders of results, and a browser to look at a page with."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import tempfile
from pathlib import Path

RESULTS = Path(__file__).parents[1] / "data" / "results"
"""A few results of every kind; the repository's own are written again by the commands of its README."""
EVIL = "<img src=x onerror=alert(1)></script>"
MACHINE = {
    "date": "2026-01-01T00:00:00+00:00",
    "packages": {"torch": "2.0"},
    "python": "3.11.0",
    "git": {"commit": "0123456789abcdef", "dirty": False},
    "cpu": "a processor",
    "cores": 2,
    "device": "cpu",
    "threads": 2,
}
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--virtual-time-budget=5000"),
]


def write_folder(folder, model="tiny", method="teal", title="A suite", values=None, stderr=None):
    """Write results.csv and provenance.json with one perplexity a method."""
    folder.mkdir(parents=True)
    values = values or {"dense": "20.0", method: "24.5"}
    facts = {"suite": {"name": "one", "title": title}, "models": [{"name": model, "sha256": "00"}]}
    facts |= {"assets": {}, "machines": [MACHINE], "cells": []}
    with (folder / "results.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        names = ["model", "method", "target", "byte_sparsity", "seed", "metric", "value", "stderr", "n"]
        writer.writerow([*names, "dataset", "tokens", "dtype", "reason"])
        for name, value in values.items():
            target = 0.0 if name == "dense" else 0.5
            row = [model, name, target, target, 0, "news_perplexity", value, stderr, 100]
            writer.writerow([*row, "news", "all", "float32", ""])
            facts["cells"].append({"method": name, "target": target, "seed": 0, "measured_on": 0, "model": model})
    (folder / "provenance.json").write_text(json.dumps(facts))


def find_browser():
    """Path of a Chromium, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(browser, page, folder, address="", *more):
    """The document after its script ran; nothing may have been said to the console."""
    file = Path(folder) / "index.html"
    file.write_text(page, encoding="utf-8")
    what = list(more) or ["--dump-dom"]
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *FLAGS, f"--user-data-dir={profile}", *what, f"file://{file}{address}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    said = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not said
    if not more:
        assert 'data-ready="true"' in done.stdout
    return done.stdout


def embedded(page):
    start = page.index(">", page.index('id="data"')) + 1
    return json.loads(page[start : page.index("</script>", start)])


def read(file):
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def rows(data):
    """The rows of a page as dicts."""
    columns, strings = data["rows"]["columns"], data["rows"]["strings"]
    out = []
    for place in range(len(columns["value"])):
        row = {name: values[place] for name, values in columns.items()}
        row |= {name: strings[name][row[name]] if row[name] >= 0 else None for name in strings}
        row["folder"] = data["folders"][row["folder"]]["name"]
        out.append(row)
    return out
