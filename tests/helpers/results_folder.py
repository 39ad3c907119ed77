"""Folders of results made by hand: rows, the windows behind them, and their provenance."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import page_folder
import pandas as pd

WINDOWS = 12
DENSE = np.linspace(2.0, 3.0, WINDOWS)


def row(method, value, measured=0.5, target=0.5, metric="news_perplexity", seed=0, **more):
    """Return a row of results.csv."""
    names = ("model", "method", "target", "byte_sparsity", "seed", "metric", "value")
    values = ("tiny", method, target, measured, seed, metric, value)
    common = {"stderr": 0.1, "n": 100, "dataset": "news", "tokens": "all-but-first-1", "dtype": "float32"}
    return dict(zip(names, values)) | common | {"reason": None} | more


def windows(losses_of, seed=0):
    """Of every method the dense nats plus its loss."""
    return pd.DataFrame(
        [
            {"model": "tiny", "method": method, "target": target, "seed": seed, "tokens": "all-but-first-1"}
            | {"metric": "news_nll", "window": i, "value": value}
            for (method, target), loss in ({("dense", 0.0): 0.0} | losses_of).items()
            for i, value in enumerate(DENSE + loss)
        ]
    )


def folder_with(folder: Path, rows, singles=None, models=None, name="mine") -> Path:
    """Results of a suite that has one text, ``news``."""
    folder.mkdir(parents=True)
    frame = pd.DataFrame(rows)
    frame.to_csv(folder / "results.csv", index=False)
    about = {"name": name, "title": "Mine", "description": "", "dtype": "float32"}
    about |= {
        "tokens": {"policy": "all-but-first", "n": 1, "fraction": 0.5, "prompt": None},
        "evaluation": {"texts": ["news"], "windows": 3, "window": 16},
    }
    about |= {"calibration": {"text": "news", "matching_texts": ["news"]}}
    cells = [
        {"model": r.model, "method": r.method, "target": r.target, "seed": r.seed, "tokens": r.tokens, "seconds": 1.0}
        | {"status": "done", "measured_on": 0}
        for r in frame.drop_duplicates(["model", "method", "target", "seed"]).itertuples()
    ]
    machine = page_folder.MACHINE | {"omp_wait_policy": "PASSIVE"}
    machine = machine | {"packages": {"torch": "2", "transformers": "5"}}
    facts = {"suite": about, "models": models or [{"name": "tiny", "sha256": "0" * 64}], "assets": {}}
    (folder / "provenance.json").write_text(json.dumps(facts | {"machines": [machine], "cells": cells}))
    if singles is not None:
        singles.to_parquet(folder / "windows.parquet", index=False)
    return folder
