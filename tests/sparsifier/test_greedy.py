"""Greedy allocation against a search written from the algorithm (TEAL, alg. 1)."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import oracle
import pytest
import torch
from families import SMALL, build
from transformers import AutoModelForCausalLM, LlamaConfig

from resting.baselines.teal import Teal
from resting.sparsifier import LINEAR_ROLES, AllButFirst, CalibratedModel, LastFraction, Site, TargetUnreachableError
from resting.sparsifier.allocation import BlockGreedy, GreedySearch

ROLES = tuple(oracle.LEAVES.values())
SEARCH = GreedySearch(step=0.1, windows=2, window=16, tokens=AllButFirst(1))


def teal(target=0.5, **changes):
    return Teal(target=target, allocation="greedy", **({"step": 0.1, "windows": 2, "window": 16} | changes))


def sizes(model, block=0):
    """Weights of each projection of a block, from the modules."""
    return {role: oracle.linears(model)[block, role].weight.numel() for role in ROLES}


def rested(ratios, sizes):
    return sum(ratios[role] * sizes[role] for role in ROLES) / sum(sizes.values())


def of_block(ratios, block):
    return {site.role: ratio for site, ratio in ratios.items() if site.block == block}


def thresholds(calibrated, block, ratios):
    statistics = calibrated.statistics(Teal.needs)
    return {(block, role): statistics[Site(block, role)].quantile(ratio) for role, ratio in ratios.items()}


def block_error(model, block, ids, thresholds, dense=1, first=1):
    """|| y - y_sparse || along the sequence, mean over windows and channels, on the dense model's block inputs."""
    layer, seen = model.model.layers[block], {}
    handle = layer.register_forward_pre_hook(lambda m, a, k: seen.update(args=a, kwargs=k), with_kwargs=True)
    with torch.no_grad():
        model(ids, use_cache=False)
        handle.remove()
        expected = layer(*seen["args"], **seen["kwargs"])
        mask = oracle.magnitude(thresholds, dense)
        handles = [
            module.register_forward_pre_hook(lambda m, a, key=key: (mask(key, a[0]),))
            for key, module in oracle.linears(model).items()
            if key[0] == block
        ]
        actual = layer(*seen["args"], **seen["kwargs"])
        for handle in handles:
            handle.remove()
    return float((actual - expected).double()[:, first:].norm(dim=1).mean())


def greedy(calibrated, search=SEARCH):
    statistics = calibrated.statistics(Teal.needs)
    return BlockGreedy(
        calibrated, lambda site, ratio: Teal().rule(site, statistics, ratio), LINEAR_ROLES, search, "test"
    )


@pytest.mark.parametrize("nominal", [0.0, 0.07, 0.5, 0.93, 1.0])
def test_ratios_stay_in_0_to_1_and_reach_the_nominal_bytes_of_every_block(llama, calibration, nominal):
    ratios = teal().ratios(CalibratedModel(llama, calibration), nominal)
    assert set(ratios) == {Site(*key) for key in oracle.linears(llama)}
    assert all(0.0 <= ratio <= 1.0 for ratio in ratios.values())
    for block in range(3):
        assert rested(of_block(ratios, block), sizes(llama)) == pytest.approx(nominal, abs=1e-9)


def test_bytes_are_those_of_the_real_shapes(llama, calibration):
    """Grouped-query attention: k and v are half of q and o; as squares the sum is another."""
    own = sizes(llama)
    assert 2 * own["k"] == 2 * own["v"] == own["q"] == own["o"] == 32 * 32
    square = own | {"k": own["q"], "v": own["q"]}
    search = greedy(CalibratedModel(llama, calibration))
    search.ratios(0.5)
    for path in search.paths.values():
        assert [rested(step.ratios, own) for step in path] == pytest.approx([step.sparsity for step in path])
        assert any(abs(rested(step.ratios, square) - step.sparsity) > 5e-3 for step in path)
        # Every step rests the same bytes, but where it exhausts a projection.
        rises = [b.sparsity - a.sparsity for a, b in pairwise(path)]
        last = [any(a.ratios[r] < b.ratios[r] == 1.0 for r in ROLES) for a, b in pairwise(path)]
        assert [rise for rise, exhausts in zip(rises, last) if not exhausts] == pytest.approx(
            [0.1] * (len(rises) - sum(last))
        )
        assert max(rises) < 0.1 + 1e-9


def test_the_default_step_is_the_authors_on_the_default_model():
    """Theirs is 0.05 of q: of a block of SmolLM2-135M, hidden 576, three heads of 64 for keys, 1,536 neurons."""
    q, k, neurons = 576 * 576, 192 * 576, 1536 * 576
    block = 2 * q + 2 * k + 3 * neurons
    assert Teal().step == pytest.approx(0.05 * q / block, rel=0.07)
    assert Teal().step * block / k < 0.2  # of k rests with a step; at 0.025, the default before, 0.8


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("nominal", [0.3, 0.6])
def test_a_block_s_error_is_at_most_that_of_uniform_ratios(family, calibration, nominal):
    model = build(family)
    calibrated = CalibratedModel(model, calibration)
    ratios, ids = teal(step=0.02).ratios(calibrated, nominal), calibration.windows[:2, :16]
    errors = []
    for block in range(3):
        flat = dict.fromkeys(ROLES, nominal)
        errors.append(
            [block_error(model, block, ids, thresholds(calibrated, block, r)) for r in (of_block(ratios, block), flat)]
        )
    assert all(mine <= even * (1 + 1e-5) for mine, even in errors)
    assert any(mine < 0.999 * even for mine, even in errors)


@pytest.mark.parametrize(
    ("tokens", "measured", "dense", "first"),
    [(AllButFirst(1), 1.0, 1, 1), (AllButFirst(0), 1.0, 0, 0), (LastFraction(0.5), 0.25, 8, 12)],
)
def test_the_error_is_that_of_own_hooks(llama, calibration, tokens, measured, dense, first):
    calibrated = CalibratedModel(llama, calibration)
    search = greedy(calibrated, GreedySearch(0.1, 2, 16, tokens, measured))
    for block in range(3):
        ratios = {role: 0.3 + 0.05 * i for i, role in enumerate(ROLES)}
        at = thresholds(calibrated, block, ratios)
        expected = block_error(llama, block, calibration.windows[:2, :16], at, dense, first)
        actual = search.error(block, {Site(block, role): ratio for role, ratio in ratios.items()})
        assert actual == pytest.approx(expected, rel=1e-5)
        assert expected > 0


@pytest.mark.parametrize(("step", "nominal"), [(0.1, 0.95), (0.04, 0.4)])
def test_the_path_is_that_of_a_brute_force_search(calibration, step, nominal):
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL | {"num_hidden_layers": 1})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0.0, 0.15)
    calibrated, own, ids = CalibratedModel(model, calibration), sizes(model), calibration.windows[:2, :16]
    here, path = dict.fromkeys(ROLES, 0.0), []
    while rested(here, own) < nominal:
        options = [
            here | {role: min(1.0, here[role] + step * sum(own.values()) / own[role])}
            for role in ROLES
            if here[role] < 1
        ]
        here = min(options, key=lambda option: block_error(model, 0, ids, thresholds(calibrated, 0, option)))
        path.append(here)
    search = greedy(calibrated, GreedySearch(step, 2, 16, AllButFirst(1)))
    search.ratios(nominal)
    actual = search.paths[0]
    assert [s.ratios for s in actual[1:]] == [pytest.approx(ratios, abs=1e-9) for ratios in path]
    assert [s.sparsity for s in actual] == pytest.approx([0.0, *(rested(r, own) for r in path)], abs=1e-9)
    assert sum(ratio > 0 for ratio in here.values()) > 2  # the search chose among projections


def test_between_two_steps_ratios_are_interpolated_or_uniform_where_that_is_better(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    search = greedy(calibrated)
    search.ratios(0.5)

    def error(block, ratios):
        return block_error(llama, block, calibration.windows[:2, :16], thresholds(calibrated, block, ratios))

    uneven = []
    for block, path in search.paths.items():
        low, high = path[3], path[4]
        ratios = of_block(search.ratios(0.25 * low.sparsity + 0.75 * high.sparsity), block)
        between = {role: 0.25 * low.ratios[role] + 0.75 * high.ratios[role] for role in ROLES}
        chosen = min((between, dict.fromkeys(ROLES, rested(between, sizes(llama)))), key=lambda r: error(block, r))
        assert ratios == pytest.approx(chosen)
        uneven.append(chosen is between)
    assert any(uneven)


def test_a_path_grows_and_does_not_depend_on_the_order_of_targets(llama, calibration):
    both = greedy(CalibratedModel(llama, calibration))
    rising = [both.ratios(0.3), both.ratios(0.6)]
    assert greedy(CalibratedModel(llama, calibration)).ratios(0.6) == rising[1]
    assert both.ratios(0.3) == rising[0]


def test_too_few_sites_are_told(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    search = BlockGreedy(calibrated, lambda site, ratio: None, ("gate",), SEARCH, "gate")
    with pytest.raises(TargetUnreachableError, match=r"byte sparsity 0\.5 is above this method's ceiling of"):
        search.ratios(0.5)


class Interrupted(Exception):
    pass


def stop_after(blocks):
    def report(stage, done, total, note=""):
        if stage == "greedy allocation" and done == blocks:
            raise Interrupted

    return report


def counted(monkeypatch):
    """How often a block's error is measured."""
    calls, error = Counter(), BlockGreedy.error

    def count(self, block, ratios):
        calls[block] += 1
        return error(self, block, ratios)

    monkeypatch.setattr(BlockGreedy, "error", count)
    return calls


def test_an_interrupted_search_goes_on(llama, calibration, tmp_path, monkeypatch):
    expected = teal().ratios(CalibratedModel(llama, calibration), 0.5)
    calls = counted(monkeypatch)
    with pytest.raises(Interrupted):
        teal().ratios(CalibratedModel(llama, calibration, stop_after(2), tmp_path), 0.5)
    assert calls[0] > 20
    assert calls[1] > 20
    assert calls[2] == 0
    calls.clear()
    assert teal().ratios(CalibratedModel(llama, calibration, folder=tmp_path), 0.5) == expected
    assert calls[0] <= 2  # of its result and of uniform ratios
    assert calls[1] <= 2
    assert calls[2] > 20


def test_a_damaged_file_is_searched_again(llama, calibration, tmp_path):
    expected = teal().ratios(CalibratedModel(llama, calibration, folder=tmp_path), 0.5)
    (file,) = (tmp_path / "greedy").iterdir()
    whole = file.read_text()
    for damaged in (whole[: len(whole) // 2], "", '{"0": [{"sparsity": 0.5}]}'):
        file.write_text(damaged)
        assert teal().ratios(CalibratedModel(llama, calibration, folder=tmp_path), 0.5) == expected
        assert file.read_text() == whole


@pytest.mark.parametrize("changes", [{"step": 0.2}, {"windows": 1}, {"window": 8}, {"topk": True}])
def test_another_search_has_another_file(llama, calibration, tmp_path, changes):
    teal().ratios(CalibratedModel(llama, calibration, folder=tmp_path), 0.4)
    expected = teal(**changes).ratios(CalibratedModel(llama, calibration), 0.4)
    assert teal(**changes).ratios(CalibratedModel(llama, calibration, folder=tmp_path), 0.4) == expected
    assert len(list((tmp_path / "greedy").iterdir())) == 2


def test_the_plan_carries_its_ratios(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan = teal(0.4).plan_for(calibrated)
    ratios = {Site.parse(site): ratio for site, ratio in plan.info["ratios"].items()}
    assert set(ratios) == set(plan.rules)
    assert len(set(ratios.values())) > 3
    statistics = calibrated.statistics(Teal.needs)
    for site, rule in plan.rules.items():
        assert rule.threshold == pytest.approx(statistics[site].quantile(ratios[site]), rel=1e-4)
    for block in range(3):
        assert rested(of_block(ratios, block), sizes(llama)) == pytest.approx(plan.nominal, abs=1e-6)
    assert plan.method == "teal-greedy"
    assert calibrated.measure(plan) == pytest.approx(0.4, abs=0.01)


def test_the_model_comes_back(llama, calibration):
    before = {k: v.clone() for k, v in llama.state_dict().items()}
    modules = dict(llama.named_modules())
    teal().ratios(CalibratedModel(llama, calibration), 0.5)
    assert dict(llama.named_modules()) == modules
    assert not any(m._forward_pre_hooks for m in llama.modules())
    assert all(torch.equal(v, before[k]) for k, v in llama.state_dict().items())
