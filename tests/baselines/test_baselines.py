"""CATS, CHESS and R-Sparse against oracles written from their formulas, and what all methods have in common."""

from __future__ import annotations

from contextlib import ExitStack
from types import SimpleNamespace

import oracle
import pytest
import torch
from families import build
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.method.spontaneous import Spontaneous
from resting.sparsifier import (
    ACT,
    AllButFirst,
    CalibratedModel,
    Calibration,
    Decoder,
    Meter,
    Plan,
    PlanError,
    Rule,
    Site,
    SiteStatistics,
    SparsifierError,
    TargetUnreachableError,
    UnsupportedModelError,
    fingerprint,
)
from resting.sparsifier.masking import largest

ACTIVATIONS = {"llama": F.silu, "gemma3": lambda z: F.gelu(z, approximate="tanh")}
IMPORTANCES = {"rms": lambda up: up.double().square().mean(0).sqrt(), "mean": lambda up: up.double().abs().mean(0)}
METHODS = {  # all can reach a byte sparsity of a quarter on the tiny models
    "teal": Teal,
    "teal-greedy": lambda target, **more: Teal(target, allocation="greedy", step=0.1, **more),
    "cats": Cats,
    "chess": Chess,
    "chess-attention": lambda target, **more: Chess(target, attention=True, **more),
    "rsparse": lambda target, **more: RSparse(target, rho=0.6, **more),
}


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def sparse_run(plan, model, ids):
    """Logits and byte sparsity of the project's masked model."""
    meter = Meter()
    with plan.applied(model, meter=meter):
        return logits(model, ids), meter.byte_sparsity()


def outputs(stack, model, role):
    """By block, what the projection `role` gave in the last forward."""
    seen = {}
    for (block, name), module in oracle.linears(model).items():
        if name == role:
            hook = module.register_forward_hook(lambda m, a, out, block=block: seen.update({block: out}))
            stack.callback(hook.remove)
    return seen


def importance_of(model, calibration, family, formula=None):
    """By block: u (ones without a formula), and |v| u of the dense model, both of all calibration tokens but the first.

    v = act(gate).
    """
    with ExitStack() as stack:
        gates, ups = outputs(stack, model, "gate"), outputs(stack, model, "up")
        logits(model, calibration.windows[: calibration.statistics_windows])
    result = {}
    for block, gate in gates.items():
        v = ACTIVATIONS[family](gate[:, 1:].flatten(0, 1))
        up = ups[block][:, 1:].flatten(0, 1)
        u = IMPORTANCES[formula](up) if formula else torch.ones(v.shape[1])
        result[block] = u, v.abs().double() * u
    return result


def gated(model, ids, family, keep, attention=None):
    """Logits and byte sparsity of y = W_down (up * v * m), v = act(gate), the first token dense.

    `attention` holds magnitude thresholds by (block, role).
    """
    weights = {key: module.weight.numel() for key, module in oracle.linears(model).items()}
    unread = []
    with ExitStack() as stack:
        gates, ups = outputs(stack, model, "gate"), outputs(stack, model, "up")

        def transform(key, x):
            block, role = key
            if key in (attention or {}):
                out = oracle.magnitude(attention)(key, x)
                unread.append(float((out[:, 1:] == 0).double().mean()) * weights[key])
                return out
            if role != "down":
                return x
            v = ACTIVATIONS[family](gates[block])
            m = keep(block, v)
            m[:, 0] = True
            unread.append(float((~m[:, 1:]).double().mean()) * (weights[block, "up"] + weights[key]))
            return v * m * ups[block]

        result = oracle.hooked(model, ids, transform)
    return result, sum(unread) / sum(weights.values())


@pytest.mark.parametrize("family", ACTIVATIONS)
def test_cats_equals_its_formula(family, ids, calibration):
    model = build(family)
    plan = Cats(0.25).fit(model, calibration)
    expected, unread = gated(model, ids, family, lambda block, v: v.abs() > plan.rules[Site(block, ACT)].threshold)
    actual, measured = sparse_run(plan, model, ids)
    assert torch.equal(actual, expected)
    assert measured == pytest.approx(unread, abs=1e-9)
    assert not torch.equal(actual, logits(model, ids))


@pytest.mark.parametrize("attention", [False, True])
@pytest.mark.parametrize("formula", IMPORTANCES)
@pytest.mark.parametrize("family", ACTIVATIONS)
def test_chess_equals_its_formula(family, formula, attention, ids, calibration):
    model = build(family)
    plan = Chess(0.25, importance=formula, attention=attention).fit(model, calibration)
    us = {block: u for block, (u, _) in importance_of(model, calibration, family, formula).items()}

    def keep(block, v):  # the rule's threshold is on u over its largest entry
        return v.abs() * us[block] > plan.rules[Site(block, ACT)].threshold * us[block].max()

    thresholds = {(s.block, s.role): rule.threshold for s, rule in plan.rules.items() if s.role != ACT}
    assert {role for _, role in thresholds} == ({"q", "o"} if attention else set())
    expected, unread = gated(model, ids, family, keep, thresholds)
    actual, measured = sparse_run(plan, model, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert measured == pytest.approx(unread, abs=1e-9)


@pytest.mark.parametrize("ratio", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("method", [Cats, Chess, lambda t, **more: Chess(t, importance="mean", **more)])
@pytest.mark.parametrize("family", ACTIVATIONS)
def test_thresholds_realise_the_ratio_on_the_dense_model(family, method, ratio, calibration):
    model = build(family)
    method = method(ratio, protocol="original")
    plan = method.fit(model, calibration)
    formula = getattr(method, "importance", None)
    for block, (u, importance) in importance_of(model, calibration, family, formula).items():
        rests = importance <= plan.rules[Site(block, ACT)].threshold * float(u.max())
        assert float(rests.double().mean()) == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("formula", IMPORTANCES)
def test_chess_with_a_constant_up_is_cats_bit_for_bit(model, ids, calibration, formula, topk, monkeypatch):
    constant = torch.full((48,), 0.37, dtype=torch.float64)
    moments = SimpleNamespace(root_mean_square=constant, mean_magnitude=constant)
    monkeypatch.setattr(SiteStatistics, "up_moments", lambda self: moments)
    chess = Chess(0.25, importance=formula, topk=topk).fit(model, calibration)
    cats = Cats(0.25, topk=topk).fit(model, calibration)
    assert {s: r.threshold for s, r in chess.rules.items()} == {s: r.threshold for s, r in cats.rules.items()}
    expected, unread = sparse_run(cats, model, ids)
    actual, measured = sparse_run(chess, model, ids)
    assert torch.equal(actual, expected)
    assert measured == unread


@pytest.mark.parametrize("topk", [False, True])
def test_rsparse_with_all_bytes_for_channels_is_teal_bit_for_bit(model, ids, calibration, topk):
    teal = Teal(0.5, topk=topk).fit(model, calibration)
    rsparse = RSparse(0.5, rho=1.0, topk=topk).fit(model, calibration)
    assert rsparse.rules == teal.rules
    assert torch.equal(sparse_run(rsparse, model, ids)[0], sparse_run(teal, model, ids)[0])


@pytest.mark.parametrize("family", ACTIVATIONS)
def test_rsparse_equals_its_formula(family, ids, calibration):
    """y = W (x * M) + A B (x - x * M) with score |x_i| ||W[:, i]|| and a decomposition in float64."""
    model = build(family)
    plan = RSparse(rho=0.6).plan_at(CalibratedModel(model, calibration), 0.5)
    linears = oracle.linears(model)
    read = []

    def masked(module, args, y, key):
        x, w = args[0].double(), module.weight.double()
        out, inputs = w.shape
        kept = int(inputs * 0.5 * 0.6)
        rank = int((out * inputs * 0.5 - kept * out) / (out + inputs))
        a, s, b = torch.linalg.svd(w, full_matrices=False)
        m = x.abs() * w.norm(dim=0) > plan.rules[Site(*key)].threshold
        low = (x - x * m) @ (s[:rank, None] * b[:rank]).T @ a[:, :rank].T
        read.append(float(m[:, 1:].double().mean()) * out * inputs + rank * (out + inputs))
        return torch.cat([y[:, :1], ((x * m) @ w.T + low).to(y)[:, 1:]], 1)

    with ExitStack() as stack:
        for key, module in linears.items():
            hook = module.register_forward_hook(lambda m, args, y, key=key: masked(m, args, y, key))
            stack.callback(hook.remove)
        expected = logits(model, ids)
    actual, measured = sparse_run(plan, model, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert measured == pytest.approx(1 - sum(read) / sum(m.weight.numel() for m in linears.values()), abs=1e-6)


def test_the_two_forms_of_rsparse_agree(llama, ids, calibration):
    """The masked layer gives A B x + (W - A B)(x * M)."""
    plan = RSparse(rho=0.6).plan_at(CalibratedModel(llama, calibration), 0.5)
    site = Site(1, "down")
    rule, x = plan.rules[site], torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0))
    w, (a, b) = llama.model.layers[1].mlp.down_proj.weight.double(), (f.double() for f in rule.low_rank)
    kept = x.double() * (x.abs() * w.norm(dim=0) > rule.threshold)
    with plan.applied(llama, AllButFirst(0)) as layers, torch.no_grad():
        logits(llama, ids)  # sets the token selection
        y = layers[site](x)
    torch.testing.assert_close(y.double(), x.double() @ (a @ b).T + kept @ (w - a @ b).T, rtol=1e-5, atol=1e-5)


def test_low_rank_of_full_rank_is_dense(llama, ids):
    """Even with no channel kept."""
    rules = {}
    for key, linear in oracle.linears(llama).items():
        u, s, v = torch.linalg.svd(linear.weight.detach().double(), full_matrices=False)
        rules[Site(*key)] = Rule(threshold=1e30, low_rank=(u.float(), (s[:, None] * v).float()))
    plan = Plan(rules, "test", 0.5, 0.5, fingerprint.of_model(llama))
    torch.testing.assert_close(sparse_run(plan, llama, ids)[0], logits(llama, ids), rtol=1e-4, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.lists(st.sampled_from([-3.0, -2.0, -1.0, 1.0, 2.0, 3.0]), min_size=9, max_size=9), min_size=1),
    scale=st.lists(st.sampled_from([0.5, 1.0, 1.5]), min_size=9, max_size=9) | st.just(1.0),
    count=st.integers(0, 11),
)
@example(values=[[1.0] * 9], scale=1.0, count=4)
def test_topk_keeps_so_many_of_the_largest_whatever_ties(values, scale, count):
    x = torch.tensor(values)
    weights = torch.tensor(scale) if isinstance(scale, list) else scale
    kept = largest(x, count, weights)
    assert (kept != 0).sum(-1).tolist() == [min(count, 9)] * len(x)
    assert bool(((kept == 0) | (kept == x)).all())
    for row, scores in zip(kept, (x.abs() * weights).tolist()):
        of_kept = [score for score, value in zip(scores, row.tolist()) if value != 0]
        assert sorted(of_kept, reverse=True) == sorted(scores, reverse=True)[:count]


@settings(max_examples=30, deadline=None)
@given(width=st.integers(1, 300), share=st.floats(0, 1), spread=st.floats(0, 3), seed=st.integers(0, 999))
def test_topk_of_random_inputs(width, share, spread, seed):
    g = torch.Generator().manual_seed(seed)
    x, scale = torch.randn(3, width, generator=g), (spread * torch.randn(width, generator=g)).exp()
    count = int(share * width)
    expected = torch.zeros_like(x)
    for row, kept in zip(x, expected):
        for channel in sorted(range(width), key=lambda i: float(row[i].abs() * scale[i]), reverse=True)[:count]:
            kept[channel] = row[channel]
    assert torch.equal(largest(x, count, scale), expected)


@pytest.mark.parametrize("name", METHODS)
def test_with_topk_every_token_keeps_the_same_count(llama, ids, calibration, name):
    method = METHODS[name](0.25, topk=True)
    plan = method.fit(llama, calibration)
    assert plan.method == f"{name}-topk"
    slots, linears, counts = Decoder.of(llama).slots, oracle.linears(llama), {}

    def count(site, x):
        counts[site] = set((x[:, 1:] != 0).sum(-1).flatten().tolist())

    with plan.applied(llama), ExitStack() as stack:
        for site in plan.rules:
            if site.role == ACT:
                hook = slots[site].module.register_forward_hook(lambda m, a, out, site=site: count(site, out))
            else:
                hook = linears[site[:2]].register_forward_pre_hook(lambda m, a, site=site: count(site, a[0]))
            stack.callback(hook.remove)
        logits(llama, ids)
    for site, kept in counts.items():
        density = 1 - plan.info["ratios"][str(site)]
        width = 48 if site.role in (ACT, "down") else 32
        assert kept == {round(width * density * (0.6 if name == "rsparse" else 1.0))}
    assert len(counts) == len(plan.rules)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=8, deadline=None)
@given(low=st.floats(0.05, 0.25), step=st.floats(0.05, 0.12), seed=st.integers(0, 99))
def test_measured_sparsity_is_monotone_in_the_target(name, low, step, seed):
    windows = torch.randint(3, 97, (8, 32), generator=torch.Generator().manual_seed(seed))
    calibrated = CalibratedModel(build("llama", seed), Calibration(windows))
    few, many = (calibrated.measure(METHODS[name](n).plan_at(calibrated, n)) for n in (low, low + step))
    assert 0 < few < many


@pytest.mark.parametrize("topk", [False, True])
@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 99))
def test_a_nominal_of_zero_is_dense_bit_for_bit(name, topk, seed):
    model = build("llama", seed)
    windows = torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(seed))
    plan = METHODS[name](0.0, topk=topk).plan_at(CalibratedModel(model, Calibration(windows)), 0.0)
    actual, measured = sparse_run(plan, model, windows)
    assert torch.equal(actual, logits(model, windows))
    assert measured == 0.0


@pytest.mark.parametrize(
    ("method", "ceiling"),  # of 7,680 weights in a block, up and down have 3,072, q and o 2,048
    [(Cats(0.41), "0.400"), (Chess(0.41), "0.400"), (Chess(0.7, attention=True), "0.667")],
)
def test_a_target_above_the_ceiling_names_it(llama, calibration, method, ceiling):
    with pytest.raises(TargetUnreachableError, match=rf"{method.target:g} is above this method's ceiling of {ceiling}"):
        method.fit(llama, calibration)


def test_a_model_without_an_activation_module_names_the_site(llama, calibration):
    for layer in llama.model.layers:
        del layer.mlp.act_fn
        layer.mlp.act_fn = F.silu
    with pytest.raises(UnsupportedModelError, match=r"no site 'act' in any block .* sites are q, k, v, o"):
        Cats(0.25).fit(llama, calibration)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RSparse(rho=1.5), r"rho must be in \[0, 1\], got 1\.5"),
        (lambda: RSparse(rho={"0.q": 0.5, "0.k": -0.1}), r"rho must be in \[0, 1\], got -0\.1 at 0\.k"),
        (lambda: RSparse(rho=float("nan")), r"rho must be in \[0, 1\], got nan"),
        (lambda: RSparse(svd="fast"), "svd must be exact or randomised, got 'fast'"),
        (lambda: Chess(importance="max"), "importance must be rms or mean, got 'max'"),
        (lambda: Teal(allocation="best"), "allocation must be uniform or greedy, got 'best'"),
        (lambda: Teal(step=0.5), r"step must be above 0 and at most 0\.25, got 0\.5"),
        (lambda: Rule(topk=-1), "topk must be at least 0, .* got -1"),
        (lambda: Rule(topk=3, threshold=0.5), r"without a threshold, got 3 and 0\.5"),
        (lambda: Rule(low_rank=(torch.ones(32, 2), torch.ones(3, 48))), r"low_rank must .* \[32, 2\] and \[3, 48\]"),
    ],
)
def test_bad_parameters_are_named(make, message):
    with pytest.raises(SparsifierError, match=message):
        make()


def test_a_site_without_rho_is_named(llama, calibration):
    with pytest.raises(SparsifierError, match=r"no entry for site 0\.k; it has 0\.q"):
        RSparse(rho={"0.q": 0.9}).fit(llama, calibration)


@pytest.mark.parametrize(
    ("site", "rule", "message"),
    [
        (Site(0, "down"), Rule(threshold=torch.ones(5)), r"threshold at 0\.down has 5 entries, the model needs 48"),
        (Site(1, ACT), Rule(threshold=torch.ones(32)), r"threshold at 1\.act has 32 entries, the model needs 48"),
        (Site(1, ACT), Rule(scale=torch.ones(5)), r"scale at 1\.act has 5 entries, the model needs 48"),
        (
            Site(2, "k"),
            Rule(low_rank=(torch.ones(32, 2), torch.ones(2, 32))),
            r"low_rank at 2\.k is \[32, 32\], the model needs \[16, 32\]",
        ),
    ],
)
def test_rules_of_other_shapes_are_named(llama, site, rule, message):
    plan = Plan({site: rule}, "test", 0.5, 0.5, fingerprint.of_model(llama))
    with pytest.raises(PlanError, match=message), plan.applied(llama):
        pass


@pytest.mark.parametrize("name", METHODS)
def test_spontaneous_neurons_over_every_method(llama, calibration, name):
    calibrated = CalibratedModel(llama, calibration)
    inner = METHODS[name](0.25)
    plan = Spontaneous(inner, steps=2, batch=2, window=16, warmup=1, match_every=1).plan_for(calibrated)
    assert plan.method == f"spon({inner.label})" == f"spon({name})"
    assert all(bool(plan.rules[Site(block, "down")].bias.any()) for block in range(3))
    assert calibrated.measure(plan) == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"teal-greedy"}))
def test_the_original_protocol_has_the_target_at_every_site(llama, calibration, name):
    method = METHODS[name](0.45, protocol="original")  # above the ceiling of CATS in bytes
    plan = method.fit(llama, calibration)
    assert plan.info == {"ratios": {f"{block}.{role}": 0.45 for block in range(3) for role in method.roles}}
    assert plan.method == f"{name}, original"


def test_the_original_protocol_is_refused_where_there_is_none():
    with pytest.raises(SparsifierError, match="follows the common protocol, got an inner method of 'original'"):
        Spontaneous(Teal(0.5, protocol="original"))
    with pytest.raises(SparsifierError, match="unpublished has no original protocol; allowed: common"):
        type("Unpublished", (Cats,), {"name": "unpublished", "original": None})(protocol="original")
