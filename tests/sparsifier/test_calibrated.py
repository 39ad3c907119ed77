"""What a calibrated model shares between methods, and what it keeps apart."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import resting.sparsifier
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.method.fisher import FisherError
from resting.method.mean_error import MeanError
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import AllButFirst, CalibratedModel, LastFraction


def test_a_plan_is_fitted_once(monkeypatch, llama, calibration):
    calibrated, fitted = CalibratedModel(llama, calibration), []
    fit = Teal.fit_calibrated
    monkeypatch.setattr(Teal, "fit_calibrated", lambda self, on: fitted.append(self.target) or fit(self, on))
    plan = Teal(0.5).plan_for(calibrated)
    assert Teal(0.5).plan_for(calibrated) is plan
    assert Teal(0.3).plan_for(calibrated) is not plan
    assert fitted == [0.5, 0.3]


def test_plans_are_kept_by_token_policy(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = Teal(0.5).plan_for(calibrated)
    other = calibrated.under(LastFraction(0.5))
    assert not other.plans
    assert Teal(0.5).plan_for(other) is not plan
    assert other.under(AllButFirst(1)) is calibrated
    assert list(calibrated.plans.values()) == [plan]


def test_a_plan_says_what_it_belongs_to(llama, calibration):
    plan = Teal(0.5).fit(llama, calibration)
    assert (plan.method, plan.target, plan.calibration) == ("teal", 0.5, calibration.digest)
    assert plan.model == CalibratedModel(llama, calibration).model_fingerprint


SHORT = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1}


@pytest.mark.parametrize(
    ("method", "stage", "note"),
    [
        (Teal(0.3), "statistics", "windows"),
        (RSparse(0.3), "scores", "windows"),
        (Teal(0.3, allocation="greedy", step=0.25), "greedy allocation", "blocks"),
        (RSparse(0.3, search=True, population=2, generations=1, fitness_windows=1), "evolution", "loss"),
        (MeanError(Teal(0.3)), "mean error", "windows"),
        (FisherError(Teal(0.3), windows=2), "fisher", "windows"),
        (Spontaneous(Teal(0.3), **SHORT), "train", "tokens/s"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_one_callback_is_told_of_every_stage(method, stage, note, llama, calibration):
    told = []
    method.fit(llama, calibration, on_progress=lambda *of: told.append(of))
    mine = [(done, total, text) for name, done, total, text in told if name == stage]
    assert mine
    assert all(0 < done <= total and note in text for done, total, text in mine)
    assert max(done / total for done, total, _ in mine) == 1.0


def test_no_import_of_the_interface_is_for_type_checkers_only():
    # Such an import hides a circle.
    for path in Path(resting.sparsifier.__path__[0]).rglob("*.py"):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        assert "TYPE_CHECKING" not in names, path
