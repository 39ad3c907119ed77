"""What files and kernels cannot hold is refused; what they can hold comes back exactly."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resting.baselines.teal import Teal
from resting.benchmarks.quality import plans
from resting.method.mean_error import MeanError
from resting.sparsifier import CalibratedModel, Meter, Plan, PlanError, Rule, Site, fingerprint, masked
from resting.sparsifier.decoding import decoding


class Halved(Plan):
    """Masks in a way of its own: every other channel rests."""

    @contextmanager
    def applied(self, model, *args, **kwargs):
        with super().applied(model, *args, **kwargs) as layers:
            for layer in layers.values():
                layer.mask = lambda x: x * (torch.arange(x.shape[-1]) % 2)
            yield layers


@dataclass(frozen=True)
class Shrunk(Rule):
    """Has a cutoff that no field says."""

    factor: float = 1.0

    def cutoff(self, dtype):
        return self.factor * super().cutoff(dtype)


def plan_of(model, rule=None, kind=Plan):
    rules = {Site(0, "down"): Rule(threshold=0.1) if rule is None else rule}
    return kind(rules, "x", 0.5, 0.5, fingerprint.of_model(model))


def with_attribute(model):
    plan = plan_of(model)
    object.__setattr__(plan, "mask", torch.relu)
    return plan


MORE_THAN_FIELDS = {
    "a plan of class Halved cannot be": lambda model: plan_of(model, kind=Halved),
    "a plan with an attribute mask of its own cannot be": with_attribute,
    r"a rule of class Shrunk, at 0\.down, cannot be": lambda model: plan_of(model, Shrunk(0.1, factor=3.0)),
}


@pytest.mark.parametrize("said", MORE_THAN_FIELDS)
def test_what_a_subclass_adds_is_not_lost(said, llama, tmp_path):
    plan = MORE_THAN_FIELDS[said](llama)
    with pytest.raises(PlanError, match=f"{said} saved: only the fields of Plan and Rule can"):
        plan.save(tmp_path / "p")
    with pytest.raises(PlanError, match=f"{said} exported"):
        plan.export(llama, tmp_path / "m")
    with pytest.raises(PlanError, match=f"{said} decoded"), decoding(plan, llama):
        pass
    assert not list(tmp_path.iterdir())
    assert not plan.is_plain
    with plan.applied(llama):  # the definition runs any plan
        pass


def test_files_hold_no_subclass(llama, tmp_path):
    plan_of(llama).save(tmp_path / "p")
    with pytest.raises(PlanError, match=r"none of Halved: use Plan\.load"):
        Halved.load(tmp_path / "p")


def test_rules_of_a_subclass_that_differ_do_not_share_a_mask(llama, ids):
    """Three sites read one tensor: each through its own rule."""
    rules = {Site(0, "q"): Shrunk(0.1, factor=1.0), Site(0, "k"): Shrunk(0.1, factor=1e6), Site(0, "v"): Rule(0.1)}
    meter = Meter()
    with torch.no_grad(), Plan(rules, "x", 0.5, 0.5, fingerprint.of_model(llama)).applied(llama, meter=meter):
        llama(ids)
    sparsity = meter.site_sparsity()
    assert sparsity[Site(0, "k")] == 1.0
    assert sparsity[Site(0, "q")] == sparsity[Site(0, "v")] < 0.5


@pytest.mark.parametrize("kind", [Halved, Plan])
def test_the_sweep_fits_a_plan_of_a_subclass_again(kind, llama, monkeypatch, cache):
    """A plan in the cache is what was fitted: of the same class, with the same masks."""
    fits = []

    class Method:
        def plan_for(self, calibrated):
            fits.append(calibrated)
            return plan_of(llama, kind=kind)

    class Cell:
        sparsifier = Method()

    class Loaded:
        fit_setting = ()
        source = SimpleNamespace(weights="as-is")
        model = torch.nn.Identity()

        def calibrated(self, cell):
            return None

    monkeypatch.setattr(plans, "cell_key", lambda cell, setting: "0" * 64)
    found = [plans.fitted(Loaded(), Cell()) for _ in range(2)]
    assert [type(plan) for plan in found] == [kind, kind]
    assert len(fits) == (2 if kind is Halved else 1)


class Louder(Teal):
    """Keeps the name and the parameters of its parent, and has another rule."""

    def rule(self, site, statistics, ratio):
        rule = super().rule(site, statistics, ratio)
        return replace(rule, scale=2.0, threshold=2.0 * rule.threshold)


def test_methods_of_one_name_and_different_classes_have_plans_of_their_own(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plain, louder = Teal(target=0.5).plan_for(calibrated), Louder(target=0.5).plan_for(calibrated)
    assert {rule.scale for rule in plain.rules.values()} == {1.0}
    assert {rule.scale for rule in louder.rules.values()} == {2.0}
    wrapped = [MeanError(inner(target=0.5)).plan_for(calibrated) for inner in (Teal, Louder)]
    assert [next(iter(plan.rules.values())).scale for plan in wrapped] == [1.0, 2.0]
    assert Teal(target=0.5).plan_for(calibrated) is plain


DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64])
NUMBERS = st.floats(0.0, 2.0**100, width=32)


@st.composite
def vectors(draw, signed=False, infinite=False, length=6):
    dtype = draw(DTYPES)
    largest = float(torch.finfo(dtype).max)
    values = draw(st.lists(st.floats(-largest if signed else 0.0, largest), min_size=length, max_size=length))
    vector = torch.tensor(values, dtype=torch.float64).clamp(-largest, largest).to(dtype)
    vector = vector.nan_to_num(posinf=largest, neginf=-largest)
    if infinite:
        vector[draw(st.integers(0, length - 1))] = math.inf
    # A view with strides of its own is a legal vector too.
    return vector if draw(st.booleans()) else torch.stack([vector, vector], 1)[:, 0]


@st.composite
def rules(draw):
    topk = draw(st.none() | st.integers(0, 10))
    threshold = st.just(0.0) | NUMBERS | st.just(math.inf) | st.just(5e-324) | vectors() | vectors(infinite=True)
    low_rank = st.tuples(vectors(signed=True, length=4), vectors(signed=True, length=6))
    factors = draw(st.none() | low_rank)
    return Rule(
        threshold=0.0 if topk is not None else draw(threshold),
        scale=draw(st.sampled_from([0.0, 1.0, 1e-40, 3.3]) | NUMBERS | vectors()),
        shift=draw(st.sampled_from([0.0, -0.0, -2.5]) | vectors(signed=True)),
        bias=draw(st.none() | vectors(signed=True, length=4)),
        low_rank=None if factors is None else (factors[0][:, None], factors[1][None]),
        topk=topk,
    )


def same(a, b):
    if isinstance(a, tuple):
        return isinstance(b, tuple) and all(map(same, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return type(a) is type(b) and a == b


@settings(max_examples=150, deadline=None)
@given(first=rules(), second=rules())
def test_every_legal_rule_survives_exactly(tmp_path_factory, first, second):
    folder = tmp_path_factory.mktemp("plan") / "p"
    plan = Plan(
        {Site(1, "down"): first, Site(0, "q"): second, Site(0, "k"): Rule()}, "é", 0.1, 1 / 3, "m", "c", {"a": 1}
    )
    plan.save(folder)
    loaded = Plan.load(folder)
    assert list(loaded.rules) == list(plan.rules)
    for site, rule in plan.rules.items():
        for field in fields(Rule):
            assert same(getattr(rule, field.name), getattr(loaded.rules[site], field.name)), field.name
        x = torch.randn(3, 6)
        assert torch.equal(masked(x, rule).nan_to_num(), masked(x, loaded.rules[site]).nan_to_num())
    for field in fields(Plan):
        assert field.name == "rules" or getattr(plan, field.name) == getattr(loaded, field.name)
    text = (folder / "plan.json").read_bytes(), (folder / "rules.safetensors").read_bytes()
    loaded.save(folder)
    assert text == ((folder / "plan.json").read_bytes(), (folder / "rules.safetensors").read_bytes())


def test_everything_rests_at_an_infinite_threshold(tmp_path, llama, ids):
    plan = plan_of(llama, Rule(threshold=math.inf))
    plan.save(tmp_path / "p")
    meter = Meter()
    with torch.no_grad(), Plan.load(tmp_path / "p").applied(llama, meter=meter):
        llama(ids)
    assert meter.site_sparsity()[Site(0, "down")] == 1.0


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scale": math.inf}, "scale must be finite"),
        ({"shift": math.nan}, "shift must be finite"),
        ({"shift": torch.tensor([0.0, -math.inf])}, "shift must be finite"),
        ({"bias": torch.tensor([math.nan])}, "bias must be finite"),
        ({"bias": torch.tensor(1.0)}, "bias a vector"),
        ({"low_rank": (torch.ones(2, 1), torch.full((1, 3), math.inf))}, "V must be finite"),
        ({"low_rank": (torch.ones(2), torch.ones(2))}, r"low_rank must be \[out, rank\]"),
        ({"threshold": math.nan}, "threshold must be a number"),
        ({"topk": 2.5}, "topk must be at least 0, whole"),
    ],
)
def test_what_no_rule_can_mean_is_refused(values, said):
    with pytest.raises(PlanError, match=said):
        Rule(**values)


def test_a_vector_without_axes_is_a_number():
    assert Rule(threshold=torch.tensor(0.25), scale=2) == Rule(threshold=0.25, scale=2.0)
    assert type(Rule(scale=2).scale) is float


def test_a_save_that_fails_leaves_nothing_behind(llama, tmp_path):
    plan = replace(plan_of(llama), info={"seen": {1, 2}})
    with pytest.raises(PlanError, match=r"cannot be saved: .*set.*; allowed: what JSON holds"):
        plan.save(tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_a_rule_in_the_file_that_the_list_lacks(llama, tmp_path):
    plan_of(llama).save(tmp_path / "p")
    meta = json.loads((tmp_path / "p" / "plan.json").read_text())
    (tmp_path / "p" / "plan.json").write_text(json.dumps(meta | {"sites": ["1.down"]}))
    with pytest.raises(PlanError, match=r"has a rule at 0\.down, which plan\.json does not list"):
        Plan.load(tmp_path / "p")
