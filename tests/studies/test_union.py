"""The union of masks against plain loops over tokens."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch

from resting.baselines.cats import Cats
from resting.baselines.teal import Teal
from resting.benchmarks.cells.suite import EvaluationConfig
from resting.benchmarks.errors import SuiteError
from resting.benchmarks.studies import union
from resting.sparsifier import AllButFirst, Meter, Plan, Rule, Site, fingerprint

WINDOWS = torch.randint(3, 97, (8, 17), generator=torch.Generator().manual_seed(6))


def observed(model, plan):
    return union.observe(model, plan, WINDOWS, AllButFirst(1), len(WINDOWS))


def kept_inputs(model, plan, block):
    """What the masked down projection of one block is called with: [sequences, steps, channels]."""
    seen = []
    with plan.applied(model) as layers:
        hook = layers[Site(block, "down")].linear.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
        with torch.no_grad():
            model(WINDOWS)
        hook.remove()
    return seen[0][:, 1:] != 0


def test_unions_are_those_of_plain_loops(llama, calibration):
    plan = Teal(0.5).fit(llama, calibration)
    meter = observed(llama, plan)
    rows = {(r["input"], r["order"], r["tokens"]): r for r in union.union_rows(meter)}
    kept = [kept_inputs(llama, plan, block) for block in range(3)]
    for count in (1, 2, 4, 8):
        in_row, across = [], []
        for masks in kept:
            sequences, steps, _ = masks.shape
            in_row.append(
                torch.stack(
                    [
                        masks[row, begin : begin + count].any(0).double().mean()
                        for row, begin in itertools.product(range(sequences), range(0, steps - count + 1, count))
                    ]
                ).mean()
            )
            across.append(
                torch.stack(
                    [
                        masks[begin : begin + count, step].any(0).double().mean()
                        for step, begin in itertools.product(range(steps), range(0, sequences - count + 1, count))
                    ]
                ).mean()
            )
        assert rows["down", "consecutive", count]["density"] == pytest.approx(float(sum(in_row) / 3))
        assert rows["down", "same step", count]["density"] == pytest.approx(float(sum(across) / 3))
        p = [masks.double().mean((0, 1)) for masks in kept]
        independent = sum(float((1 - (1 - one) ** count).mean()) for one in p) / 3
        assert rows["down", "consecutive", count]["independent"] == pytest.approx(independent)
    assert ("down", "consecutive", 16) in rows
    assert ("down", "same step", 16) not in rows


def test_one_token_is_the_density_and_more_are_no_less(model, calibration):
    plan = Teal(0.4).fit(model, calibration)
    meter = observed(model, plan)
    rows = union.union_rows(meter)
    for name, order in itertools.product({r["input"] for r in rows}, union.ORDERS):
        found = [r["density"] for r in rows if r["input"] == name and r["order"] == order]
        assert found == sorted(found)
    plain = Meter()
    with torch.no_grad(), plan.applied(model, AllButFirst(1), plain):
        model(WINDOWS)
    of_all = next(r for r in rows if r["input"] == union.ALL and r["tokens"] == 1)
    assert meter.byte_sparsity() == pytest.approx(plain.byte_sparsity())
    assert 1.0 - of_all["density"] == pytest.approx(plain.byte_sparsity(), abs=1e-6)


def static(model, width=32):
    """A plan whose masks keep the same half of the channels for every token."""
    cutoff = torch.where(torch.arange(width) % 2 == 0, 0.0, torch.inf)
    rules = {Site(block, role): Rule(threshold=cutoff) for block in range(3) for role in ("q", "k", "v")}
    return Plan(rules, "static", 0.0, 0.0, fingerprint.of_model(model))


def test_a_static_mask_is_its_own_union(llama):
    meter = observed(llama, static(llama))
    for row in union.union_rows(meter):
        assert row["density"] == pytest.approx(0.5)
        assert row["independent"] == pytest.approx(0.5)
    for row in union.always_rows(meter):
        assert row["channels"] == pytest.approx(0.5)
        assert row["of_read"] == pytest.approx(1.0)


def test_a_share_of_the_channels_is_always_active(llama):
    found = union.Channels(elements=6.0)
    kept = torch.zeros(2, 50, 4, dtype=torch.bool)
    kept[..., 0] = True
    kept[..., 1] = torch.arange(50) % 25 != 0  # 96 %
    kept[..., 2] = torch.arange(50) % 2 == 0
    found.add(kept)
    meter = union.UnionMeter()
    meter.channels[Site(0, "down")] = found
    rows = {(r["input"], r["above"]): r for r in union.always_rows(meter)}
    assert rows["down", 0.99]["channels"] == pytest.approx(0.25)
    assert rows["down", 0.95]["channels"] == pytest.approx(0.50)
    assert rows["down", 0.95]["of_read"] == pytest.approx(1.96 / 2.46)
    assert rows[union.ALL, 0.95]["bytes"] == pytest.approx(0.5)


def test_masks_of_the_gate_are_seen_once(llama, calibration):
    meter = observed(llama, Cats(0.3).fit(llama, calibration))
    assert {site.role for site in meter.channels} == {"act"}
    assert meter.channels[Site(0, "act")].elements == 2 * 32 * 48  # rows of up and columns of down


def test_a_suite_without_masks_is_refused(llama):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    model = SimpleNamespace(config=config)
    loaded = SimpleNamespace(model=model, windows=lambda *a: SimpleNamespace(ids=WINDOWS))
    cell = SimpleNamespace(config=SimpleNamespace(name="dense"))
    with pytest.raises(SuiteError, match="a method that masks something"):
        union.measure(loaded, [cell], "news", EvaluationConfig(texts=["news"]))


def test_the_last_tokens_are_those_of_a_suite_that_scores_them(llama, calibration):
    plan = Teal(0.5).fit(llama, calibration)
    rows = {}
    for last in (None, 4, 99):
        meter = union.observe(llama, plan, WINDOWS, AllButFirst(1), len(WINDOWS), last=last)
        rows[last] = {(r["input"], r["order"], r["tokens"]): r["density"] for r in union.union_rows(meter)}
    kept = torch.stack([kept_inputs(llama, plan, block)[:, -4:] for block in range(3)])
    assert rows[4]["down", "consecutive", 1] == pytest.approx(float(kept.double().mean()))
    assert ("down", "consecutive", 8) not in rows[4]
    assert rows[99] == rows[None] != rows[4]


def test_windows_are_those_of_a_suite_that_scores_their_last_tokens(llama):
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
    asked = []

    def windows(text, role, length, count, stride=None):
        asked.append((text, length, count))
        return SimpleNamespace(ids=WINDOWS)

    loaded = SimpleNamespace(model=SimpleNamespace(config=config), windows=windows)
    for evaluation in (
        EvaluationConfig(texts=["news"], window=32, windows=7, scored=8),
        EvaluationConfig(texts=["news"]),
    ):
        with pytest.raises(SuiteError):
            union.measure(loaded, [], "news", evaluation)
    assert asked == [("news", 32, 7), ("news", 64, union.SEQUENCES * union.BATCHES)]
