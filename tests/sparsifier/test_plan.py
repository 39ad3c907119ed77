"""Plans on disk, and on the wrong model."""

from __future__ import annotations

import json

import pytest
import torch
from families import build

from resting.baselines.teal import Teal
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import Plan, PlanError, Rule, Site, SparsifierError, fingerprint


def test_save_and_load(tmp_path, llama, ids, calibration):
    plan = Spontaneous(Teal(target=0.5), steps=2, batch=2, window=16, warmup=1).fit(llama, calibration)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert {f.name for f in (tmp_path / "plan").iterdir()} == {"plan.json", "rules.safetensors"}
    assert (loaded.method, loaded.target, loaded.calibration) == (plan.method, 0.5, calibration.digest)
    with torch.no_grad(), plan.applied(llama):
        expected = llama(ids).logits
    with torch.no_grad(), loaded.applied(llama):
        assert torch.equal(llama(ids).logits, expected)


def test_all_fields_survive(tmp_path, llama):
    rule = Rule(0.25, torch.rand(48), torch.rand(48), torch.rand(32), (torch.rand(32, 2), torch.rand(2, 48)))
    Plan({Site(2, "down"): rule, Site(0, "q"): Rule()}, "x", 0.5, 0.4, "m").save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p").rules
    assert loaded[Site(0, "q")] == Rule()
    again = loaded[Site(2, "down")]
    assert again.threshold == 0.25
    for name in ("scale", "shift", "bias"):
        assert torch.equal(getattr(again, name), getattr(rule, name))
    assert all(torch.equal(a, b) for a, b in zip(again.low_rank, rule.low_rank))


def test_another_model_is_refused(llama, calibration):
    plan = Teal(target=0.5).fit(llama, calibration)
    with pytest.raises(PlanError, match="fitted on model"), plan.applied(build("llama", seed=1)):
        pass


def test_written_weights_are_noticed(llama, calibration):
    plan = Teal(target=0.5).fit(llama, calibration)
    with torch.no_grad():
        llama.model.layers[0].mlp.down_proj.weight[0, 0] += 1
    with pytest.raises(PlanError, match="fitted on model"), plan.applied(llama):
        pass


def test_a_plan_fits_the_same_weights_in_bfloat16(llama, calibration):
    plan = Teal(target=0.5).fit(llama, calibration)
    with plan.applied(llama.to(torch.bfloat16)):
        pass


def test_wrong_shapes_and_sites_are_named(llama):
    model = fingerprint.of_model(llama)
    with (
        pytest.raises(PlanError, match=r"bias at 0.down has 5 entries, the model needs 32"),
        Plan({Site(0, "down"): Rule(bias=torch.ones(5))}, "x", 0.5, 0.5, model).applied(llama),
    ):
        pass
    with (
        pytest.raises(PlanError, match=r"a rule at 9\.down"),
        Plan({Site(9, "down"): Rule()}, "x", 0.5, 0.5, model).applied(llama),
    ):
        pass


def test_damaged_and_newer_plans(tmp_path, llama, calibration):
    with pytest.raises(PlanError, match="no readable plan"):
        Plan.load(tmp_path / "nothing")
    plan = Teal(target=0.5).fit(llama, calibration)
    plan.save(tmp_path / "p")
    meta = json.loads((tmp_path / "p" / "plan.json").read_text())
    (tmp_path / "p" / "plan.json").write_text(json.dumps(meta | {"format": 99}))
    with pytest.raises(PlanError, match="format is newer"):
        Plan.load(tmp_path / "p")


@pytest.mark.parametrize("target", [-0.1, 1.0, float("nan")])
def test_targets_outside_the_range(target):
    with pytest.raises(SparsifierError, match="target must be in"):
        Teal(target=target)


def test_negative_thresholds_are_refused():
    with pytest.raises(PlanError, match="threshold must be"):
        Rule(threshold=-1.0)


def test_a_folder_that_is_no_plan_is_not_overwritten(tmp_path, llama, calibration):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(PlanError, match="exists and is no plan"):
        Teal(target=0.5).fit(llama, calibration).save(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("key", ["format", "sites", "method"])
def test_a_plan_that_lacks_a_key_is_damaged(tmp_path, llama, calibration, key):
    Teal(target=0.5).fit(llama, calibration).save(tmp_path / "p")
    meta = json.loads((tmp_path / "p" / "plan.json").read_text())
    meta.pop(key)
    (tmp_path / "p" / "plan.json").write_text(json.dumps(meta))
    with pytest.raises(PlanError, match="no readable plan"):
        Plan.load(tmp_path / "p")
