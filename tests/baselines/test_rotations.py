"""LaRoSA, the rotations without bytes and rotated WINA against their formulas, on a Llama whose norms have weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from families import SMALL
from oracle import hooked, linears
from rewriting import build
from transformers import Phi3Config

from resting.baselines.larosa import LaRoSA
from resting.baselines.rotation_global import RotationGlobal
from resting.baselines.rotation_heads import RotationHeads
from resting.baselines.teal_folded import TealFolded
from resting.baselines.wina import Wina
from resting.baselines.wina_rotated import WinaRotated
from resting.benchmarks.cells import registry
from resting.method.mean_error import MeanError
from resting.sparsifier import (
    FOLDED,
    AllButFirst,
    CalibratedModel,
    Meter,
    Plan,
    Site,
    SparsifierError,
    Statistic,
    Statistics,
    TargetUnreachableError,
    Transform,
    Transformed,
    UnsupportedModelError,
)
from resting.sparsifier.transform import eigenbasis, explicit, head_bases, random_rotation, right_singular_basis

BEHIND = dict.fromkeys("qkv", "attention") | dict.fromkeys(("gate", "up"), "mlp")


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture
def calibrated(model, calibration):
    return CalibratedModel(model, calibration)


def gamma(model, block, role):
    layer = model.model.layers[block]
    norm = layer.input_layernorm if BEHIND[role] == "attention" else layer.post_attention_layernorm
    return norm.weight.detach()


def dense_inputs(model, calibration) -> dict[tuple[int, str], torch.Tensor]:
    """What every linear reads on the calibration text, all tokens but the first; behind a norm without its weight."""
    found: dict[tuple[int, str], list[torch.Tensor]] = {}

    def see(key, x):
        seen = x[:, 1:].flatten(0, 1).double()
        found.setdefault(key, []).append(seen / gamma(model, *key).double() if key[1] in BEHIND else seen)
        return x

    for ids in calibration.windows[: calibration.statistics_windows].split(4):
        hooked(model, ids, see)
    return {key: torch.cat(parts) for key, parts in found.items()}


def largest(x, k):
    cut = x.abs().sort(-1, descending=True).values[..., k - 1 : k]
    return x * (x.abs() >= cut)


def test_bases_are_orthogonal_and_sorted():
    x = torch.randn(500, 24, dtype=torch.float64) @ torch.randn(24, 24, dtype=torch.float64)
    gram = x.T @ x / len(x)
    basis = eigenbasis(gram)
    weight = torch.randn(6, 24, dtype=torch.float64)
    for rotation in (basis, random_rotation(24, 3), right_singular_basis(weight)):
        assert float((rotation.T @ rotation - torch.eye(24)).norm()) < 1e-10
    moments = basis.T @ gram @ basis
    energy = moments.diagonal()
    assert torch.allclose(moments, energy.diag(), atol=1e-9 * float(energy[0]))
    assert bool((energy.diff() <= 0).all())
    # Of all choices of six fixed channels, in whatever basis, none has more of the energy.
    assert float((x @ basis)[:, :6].square().sum()) > float(x.square().sum(0).sort(descending=True).values[:6].sum())
    columns = weight @ right_singular_basis(weight)
    assert torch.allclose(columns.T @ columns, (columns.T @ columns).diagonal().diag(), atol=1e-9)
    heads = head_bases(gram, groups=2, size=4)
    for g, rotation in enumerate(heads):  # 6 heads, 3 of them share one
        shared = sum(gram[i : i + 4, i : i + 4] for i in range(12 * g, 12 * g + 12, 4))
        turned = rotation.T @ shared @ rotation
        assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-9 * float(turned.max()))
    with pytest.raises(SparsifierError, match="24 channels are no 2 groups of heads of 5 channels"):
        head_bases(gram, 2, 5)


def test_second_moments_are_a_statistic(model, calibration):
    inputs = dense_inputs(model, calibration)
    statistics = Statistics.collect(model, calibration, {Statistic.GRAM})
    for site in (Site(0, "q"), Site(1, "o"), Site(2, "down")):
        x = inputs[site.block, site.role]
        if site.role in BEHIND:
            x = x * gamma(model, site.block, site.role).double()
        assert torch.allclose(statistics[site].second_moment(), x.T @ x / len(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(SparsifierError, match=r"add Statistic\.GRAM"):
        Statistics.collect(model, calibration)[Site(0, "q")].second_moment()


def test_larosa_is_its_formula(model, calibration, calibrated, ids):
    plan, inputs = LaRoSA(target=0.3).plan_for(calibrated), dense_inputs(model, calibration)
    s = plan.nominal
    assert calibrated.measure(plan) == pytest.approx(0.3, abs=0.01)
    rotations = []
    for block in range(3):
        n = inputs[block, "q"]
        values, vectors = torch.linalg.eigh(n.T @ n)
        rotations.append(vectors[:, values.argsort(descending=True)].float())

    def transform(key, x):
        block, role = key
        if role not in BEHIND:
            return largest(x, int((1 - 1.2 * s) * x.shape[-1]))
        weight, rotation = gamma(model, block, role), rotations[block]
        return weight * (largest(x / weight @ rotation, int((1 - 0.8 * s) * x.shape[-1])) @ rotation.T)

    with torch.no_grad(), plan.applied(model, AllButFirst(0)):
        found = model(ids).logits
    wanted = hooked(model, ids, transform)
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))


def test_larosa_counts_its_adapters_and_has_a_ceiling(calibrated):
    elements = calibrated.decoder.elements
    plans = {name: registry.build(name, 0.3).plan_for(calibrated) for name in ("larosa", "larosa-adapters-free")}
    assert plans["larosa"].transform.extra_elements == 2 * 32**2
    assert plans["larosa-adapters-free"].transform.extra_elements == 0
    assert plans["larosa"].info["adapters"] == pytest.approx(2 * 32**2 / elements, abs=1e-6)
    assert plans["larosa"].nominal > plans["larosa-adapters-free"].nominal
    rules = LaRoSA().plan_at(calibrated, 0.95).rules  # 1.2 times that is above 1: one channel is kept
    assert {rules[Site(0, role)].topk for role in ("o", "down")} == {1}
    with pytest.raises(TargetUnreachableError, match=r"0\.9 is above this method's ceiling of 0\.7\d\d"):
        LaRoSA(target=0.9).plan_for(calibrated)


def test_the_global_rotation_is_its_formula(model, calibration, calibrated, ids):
    method = RotationGlobal(target=0.4, heads=True)
    plan, inputs = method.plan_for(calibrated), dense_inputs(model, calibration)
    total = torch.zeros(32, 32, dtype=torch.float64)
    for block in range(3):
        for role in ("q", "gate"):
            moment = inputs[block, role].T @ inputs[block, role]
            total += moment / moment.trace()
    rotation = torch.linalg.eigh(total)[1].flip(-1).float()
    heads = []
    for block in range(3):
        o = inputs[block, "o"]
        parts = [o[:, i : i + 8].T @ o[:, i : i + 8] for i in range(0, 32, 8)]
        two = [torch.linalg.eigh(parts[g] + parts[g + 1])[1].flip(-1).float() for g in (0, 2)]
        heads.append(torch.block_diag(two[0], two[0], two[1], two[1]))

    def transform(key, x):
        block, role = key
        threshold = plan.rules[Site(block, role)].threshold
        if role == "down":
            return x * (x.abs() > threshold)
        weight = gamma(model, block, role) if role in BEHIND else torch.ones(32)
        turn = rotation if role in BEHIND else heads[block]
        turned = x / weight @ turn
        return weight * (turned * (turned.abs() > threshold) @ turn.T)

    with torch.no_grad(), plan.applied(model, AllButFirst(0)):
        found = model(ids).logits
    wanted = hooked(model, ids, transform)
    assert torch.allclose(found, wanted, atol=1e-3 * float(wanted.abs().max()))
    # Thresholds are quantiles of the dense model in the rotated basis.
    n = inputs[1, "gate"].float() @ rotation
    ratio = plan.info["ratios"]["1.gate"]
    assert plan.rules[Site(1, "gate")].threshold == pytest.approx(float(n.abs().flatten().quantile(ratio)), rel=0.01)


def test_folding_changes_teal_s_masks_and_not_wina_s(model, calibrated, ids):
    @dataclass
    class WinaFolded(Transformed, Wina):
        name: ClassVar[str] = "wina-folded"

        def rewriting(self, calibrated: CalibratedModel) -> Transform:
            return FOLDED

    def run(plan: Plan) -> tuple[torch.Tensor, float]:
        meter = Meter()
        with torch.no_grad(), plan.applied(model, AllButFirst(1), meter):
            return model(ids).logits, meter.byte_sparsity()

    (wina, bytes_of_wina), (folded, bytes_of_folded) = (run(m.plan_at(calibrated, 0.4)) for m in (Wina(), WinaFolded()))
    assert torch.allclose(wina, folded, atol=2e-5 * float(wina.abs().max()))
    assert bytes_of_wina == pytest.approx(bytes_of_folded, abs=1e-4)
    teal = run(registry.build("teal", 0.4).plan_at(calibrated, 0.4))[0]
    assert not torch.allclose(teal, run(TealFolded().plan_at(calibrated, 0.4))[0], atol=1e-2 * float(teal.abs().max()))


def test_wina_rotated_has_orthogonal_columns_of_k_and_gate(model, calibrated):
    plan = WinaRotated(target=0.3).plan_for(calibrated)
    assert calibrated.measure(plan) == pytest.approx(0.3, abs=0.01)
    assert plan.transform.adapters == 5
    for block in range(3):
        with explicit(plan.transform, model):
            for role in ("k", "gate"):
                weight = linears(model)[block, role].weight.double()
                gram = weight.T @ weight
                assert torch.allclose(gram, gram.diagonal().diag(), atol=1e-5 * float(gram.max()))
                assert torch.allclose(plan.rules[Site(block, role)].scale.double(), weight.norm(dim=0), atol=1e-5)
    assert plan.rules[Site(0, "q")].scale == 1.0


def test_what_wraps_sees_the_rotated_weights(model, calibration, calibrated):
    """The bias of a mean error is that of the rotated matrix, applied to what its mask drops."""
    inner = RotationGlobal(target=0.4)
    plan = MeanError(inner, sites=("gate",)).plan_for(calibrated)
    base, inputs = inner.plan_for(calibrated), dense_inputs(model, calibration)
    assert plan.transform is base.transform
    assert plan.model == base.model
    rotation = plan.transform.rotations[0].double()
    for block in range(3):
        x = inputs[block, "gate"] @ rotation
        dropped = (x * (x.abs() <= base.rules[Site(block, "gate")].threshold)).mean(0)
        weight = linears(model)[block, "gate"].weight.double() * gamma(model, block, "gate").double() @ rotation
        assert torch.allclose(plan.rules[Site(block, "gate")].bias.double(), weight @ dropped, atol=1e-4)


def test_training_sees_the_rotated_model(calibrated, tmp_path, model, ids):
    parameters = {"steps": 2, "batch": 2, "window": 16, "warmup": 1, "match_every": 1}
    for name in ("spon-refined(rotation-global-heads)", "spon-refined(larosa-threshold)", "spon(larosa)"):
        plan = registry.build(name, 0.3, parameters).plan_for(calibrated)
        assert (plan.method, plan.info["matched"]) == (name, pytest.approx(0.3, abs=0.011))
        assert plan.transform is registry.build(name, 0.3, parameters).transform(calibrated)
        plan.save(tmp_path / "plan")
        with torch.no_grad(), plan.applied(model):
            wanted = model(ids).logits
        with torch.no_grad(), Plan.load(tmp_path / "plan").applied(model):
            assert torch.equal(model(ids).logits, wanted)
    with pytest.raises(SparsifierError, match=r"spon-refined\(larosa\) has no threshold on"):
        registry.build("spon-refined(larosa)", 0.3, parameters).plan_for(calibrated)


def test_random_rotations_are_a_control(calibrated):
    for cls in (RotationGlobal, RotationHeads, LaRoSA, WinaRotated):
        first, again, other = (cls(basis="random", seed=seed).transform(calibrated) for seed in (0, 0, 1))
        assert first is again
        assert not torch.equal(next(iter(first.tensors().values())), next(iter(other.tensors().values())))
        assert cls(basis="random").has_seed
        assert not cls().has_seed
        with pytest.raises(SparsifierError, match=r"basis must be .* or random, got 'pca'"):
            cls(basis="pca")
    for cls in (LaRoSA, WinaRotated):
        with pytest.raises(SparsifierError, match="adapters must be counted or free, got 'none'"):
            cls(adapters="none")


def test_fused_matrices_are_rotated_where_that_is_exact(calibration):
    calibrated = CalibratedModel(build(Phi3Config(**SMALL)), calibration)
    for name in ("larosa", "rotation-global", "teal-folded"):
        plan = registry.build(name, 0.3).plan_for(calibrated)
        assert calibrated.measure(plan) == pytest.approx(0.3, abs=0.012)
        assert Site(0, "qkv") in plan.rules
    with pytest.raises(UnsupportedModelError, match="computes q, k, v by one matrix: no rule of k alone"):
        WinaRotated().plan_for(calibrated)
    with pytest.raises(UnsupportedModelError, match="block 0 has no v of its own to rotate heads by; it has qkv, o"):
        RotationHeads().plan_for(calibrated)


def test_more_rests_at_o_with_as_many_bytes(calibrated):
    decoder = calibrated.decoder
    for at_o, nominal, wanted in ((1.5, 0.4, None), (3.0, 0.5, 1.0), (0.0, 0.4, 0.0)):
        ratios = RotationHeads(at_o=at_o).ratios(calibrated, nominal)
        found = sum(decoder.elements_at(site) * ratio for site, ratio in ratios.items())
        assert found / decoder.elements == pytest.approx(nominal)
        o, others = ratios[Site(0, "o")], ratios[Site(1, "down")]
        assert o == pytest.approx(at_o * others if wanted is None else wanted)
    assert RotationHeads().ratios(calibrated, 0.4) == registry.build("teal", 0.4).ratios(calibrated, 0.4)
    for values in ({"at_o": -1.0}, {"at_o": float("nan")}, {"at_o": 2.0, "allocation": "greedy"}):
        with pytest.raises(SparsifierError, match="at_o must be at least 0, and 1 with greedy ratios, got"):
            RotationHeads(**values)


def test_adapters_lower_the_ceiling_of_wina_rotated(calibrated):
    for target, message in ((0.9, "above this method's ceiling of 0.778"), (0.75, None)):
        if message is None:
            assert calibrated.measure(WinaRotated(target).plan_for(calibrated)) == pytest.approx(target, abs=0.01)
            continue
        for method in (WinaRotated(target), MeanError(WinaRotated(target))):
            with pytest.raises(TargetUnreachableError, match=message):
                method.plan_for(calibrated)
