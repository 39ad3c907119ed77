"""Two models of one name and suites of them, for sweeps."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import tiny
import torch


def saved(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def suite_of(here: Path, *names: str) -> str:
    text = tiny.SUITE.replace("targets", f"model = {list(names)}\ntargets")
    (here / "both.toml").write_text(text)
    return "both.toml"


def rows_of(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "results.csv", dtype={"weights": str})
