"""A suite of very different methods: what one of them cannot do is a reason in its rows, and ends nothing."""

from __future__ import annotations

import pandas as pd
import pytest
import tiny

SUITE = """
name = "mine"
title = "Mine"
targets = [0.3, 0.9]
reference = "teal"
ranking = true
[calibration]
window = 16
statistics_windows = 4
matching_window = 16
matching_windows = 2
[evaluation]
texts = ["wikipedia"]
window = 16
windows = 4
[[policies]]
policy = "decode-only"
prompt = 8
targets = [0.3]
methods = ["teal", "prompted"]
[[methods]]
name = "dense"
[[methods]]
name = "teal"
[[methods]]
name = "cats"
[[methods]]
name = "prompted"
[[methods]]
name = "late"
"""
PLUGIN = '''
"""Methods that cannot do everything."""
from contextlib import contextmanager
from dataclasses import fields
from resting.baselines.teal import Teal
from resting.sparsifier import DecodeOnly, Plan, SparsifierError

class Prompted(Teal):
    """Needs a prompt, and says so when it is fitted."""
    name = "prompted"
    def fit_calibrated(self, calibrated):
        if not isinstance(calibrated.calibration.tokens, DecodeOnly):
            raise SparsifierError("prompted takes its mask from a prompt; allowed: a decode-only policy")
        return super().fit_calibrated(calibrated)

class Late(Teal):
    """Says so when it is run."""
    name = "late"
    def fit_calibrated(self, calibrated):
        plan = super().fit_calibrated(calibrated)
        return Refusing(**{field.name: getattr(plan, field.name) for field in fields(plan)})

class Refusing(Plan):
    @contextmanager
    def applied(self, model, tokens=None, meter=None):
        raise SparsifierError("late cannot run on this text")
        yield
'''


@pytest.fixture
def ran(tmp_path, monkeypatch, cache):
    tiny.provide_texts(monkeypatch)
    (tmp_path / "limited.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.toml").write_text(SUITE)
    folder, out = tiny.model_folder(tmp_path / "model"), tmp_path / "out"
    more = ("--method", "limited:Prompted", "--method", "limited:Late", "--output", str(out))
    assert tiny.resting(monkeypatch, "run", str(tmp_path / "mine.toml"), "--model", str(folder), *more) == 0
    return next(out.iterdir())


def test_reasons_stand_in_rows_and_below_the_ranking(ran):
    frame = pd.read_csv(ran / "results.csv")
    at = frame[frame.metric == "wikipedia_perplexity"].set_index(["method", "target", "tokens"])
    assert pd.notna(at.value["teal", 0.9, "all-but-first-1"])
    assert pd.isna(at.value["cats", 0.9, "all-but-first-1"])
    assert "ceiling" in at.reason["cats", 0.9, "all-but-first-1"]
    assert "from a prompt" in at.reason["prompted", 0.3, "all-but-first-1"]
    assert pd.notna(at.value["prompted", 0.3, "decode-after-8"])
    assert at.reason["late", 0.3, "all-but-first-1"] == "late cannot run on this text"
    text = (ran / "README.md").read_text()
    plain = text.split("### Ranking at 0.30")[1].split("### Ranking")[0]
    assert "- prompted: prompted takes its mask from a prompt" in plain
    assert "- late: late cannot run on this text" in plain
    assert "| 1 " in plain
    under = text.split("### Ranking under decode-after-8 at 0.30")[1].split("\n## ")[0]
    assert "prompted" in under
    assert "teal" in under
    assert "cats" not in under
