"""A meter whose counts stay on the device gives the bytes of one that waits for every count, to the last bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from resting.baselines.cats import Cats
from resting.baselines.teal import Teal
from resting.sparsifier import (
    AllButFirst,
    CalibratedModel,
    LastFraction,
    Meter,
    Plan,
    Rule,
    Site,
    layers,
    natural_zeros,
    policy,
)
from resting.sparsifier.decoder import Decoder
from resting.sparsifier.policy import Selection


def measured(plan, model, ids):
    meter = Meter()
    with torch.inference_mode(), plan.applied(model, meter=meter):
        model(ids)
    with torch.no_grad(), plan.applied(model, meter=meter):
        model(ids.flip(0))
    return meter


@pytest.mark.parametrize("method", [Teal(0.5), Cats(0.3)])
def test_counts_that_are_tensors_change_no_bit(method, llama, ids, calibration, monkeypatch):
    plan = method.fit(llama, calibration)
    expected = measured(plan, llama, ids)
    exact = policy.count
    monkeypatch.setattr(policy, "count", lambda x: torch.tensor(exact(x)).double())  # as off the CPU
    found = measured(plan, llama, ids)
    assert any(isinstance(read, torch.Tensor) for read in found._read.values())
    assert found.byte_sparsity() == expected.byte_sparsity()
    assert found.site_sparsity() == expected.site_sparsity()
    assert isinstance(found.byte_sparsity(), float)


@pytest.mark.parametrize("zeros", [0.0, 0.5])
def test_zeros_by_nature_are_found_a_forward_later_with_the_same_result(zeros, llama, ids, calibration, monkeypatch):
    plan = Teal(0.5).fit(llama, calibration)
    kept = {site: rule for site, rule in plan.rules.items() if site.role != "down"}
    plan = replace(plan, rules=kept)
    down = llama.model.layers[1].mlp.down_proj

    def thin(module, args):
        x = args[0].clone()
        x[..., : round(zeros * x.shape[-1])] = 0.0
        return (x,)

    monkeypatch.setattr(natural_zeros, "LOOK", 64)
    handle = down.register_forward_pre_hook(thin)
    expected = measured(plan, llama, ids)
    exact = policy.count
    later = lambda x: torch.tensor(exact(x)).double()  # noqa: E731
    monkeypatch.setattr(policy, "count", later)
    monkeypatch.setattr(natural_zeros, "count", later)
    found = measured(plan, llama, ids)
    handle.remove()
    assert found.byte_sparsity() == expected.byte_sparsity()
    assert found.site_sparsity() == expected.site_sparsity()
    assert (found.site_sparsity()[Site(1, "down")] == zeros) if zeros else True
    assert found._natural.few == expected._natural.few


@pytest.mark.parametrize(("method", "sites"), [(Cats(0.3), "qkvo gate"), (Teal(0.5), "")])
def test_unmasked_inputs_are_counted_where_the_meter_wants_it_and_no_longer(
    method, sites, llama, ids, calibration, monkeypatch
):
    """Up and down rest under CATS' mask of the gate, and are counted by it; the others until few zeros are found."""
    plan = method.fit(llama, calibration)
    monkeypatch.setattr(natural_zeros, "LOOK", 8)
    asked = []
    monkeypatch.setattr(layers, "counted_unmasked", lambda x, selection: asked.append(x.shape))
    counting = Meter()
    with torch.no_grad(), plan.applied(llama, meter=counting):
        llama(ids)
        inputs = len({"qkv": 1, "o": 1, "gate": 1} if sites else {}) * len(llama.model.layers)
        assert len(asked) == inputs
        llama(ids)
        llama(ids)
    assert len(asked) == inputs
    assert counting.byte_sparsity() > 0.2


def counting(masking, x, selection, counted):
    """What the kernel gives: the kept input, and the entries of every token that are not zero."""
    kept = selection.restore_dense(masking(x), x)
    return kept, torch.count_nonzero(selection.by_token(kept), -1)[..., None].int()


RULES = {
    "teal": lambda calibrated: Teal(0.5).plan_for(calibrated).rules,
    "cats": lambda calibrated: Cats(0.3).plan_for(calibrated).rules,
    "some sites": lambda calibrated: {
        s: r for s, r in Teal(0.5).plan_for(calibrated).rules.items() if s.role in ("q", "o", "gate")
    },
    "act and inputs": lambda calibrated: Teal(0.5).plan_for(calibrated).rules | Cats(0.3).plan_for(calibrated).rules,
}


@pytest.mark.parametrize("batches", [(8,), (8, 8), (8, 8, 3)])
@pytest.mark.parametrize("tokens", [AllButFirst(1), AllButFirst(0), LastFraction(0.5)])
@pytest.mark.parametrize("rules", RULES)
def test_counts_of_all_masks_together_are_those_one_by_one(rules, tokens, batches, model, calibration, monkeypatch):
    calibrated = CalibratedModel(model, calibration)
    plan = Plan(RULES[rules](calibrated), "x", 0.5, 0.5, calibrated.model_fingerprint)
    rows = torch.randint(3, 97, (sum(batches), 16), generator=torch.Generator().manual_seed(7)).split(batches)
    found = []
    for together in (False, True):
        with monkeypatch.context() as patch:
            if together:
                patch.setattr(layers, "masked_and_counted", counting)
            counted = Meter()
            with torch.inference_mode(), plan.applied(model, tokens, counted):
                for ids in rows:
                    model(ids)
            assert bool(counted._kept._waiting) == (
                together and rules != "cats"
            )  # the last forward is added up when it is asked for
            found.append((counted.byte_sparsity(), counted.bits_read(), counted.site_sparsity()))
    assert found[1] == found[0]
    assert 0.0 < found[0][0] < 1.0


def counting_unmasked(x, selection):
    """What the kernel gives of an input without a mask."""
    return torch.count_nonzero(selection.by_token(x), -1)[..., None].int()


@pytest.mark.parametrize("look", [8, 500, 2000, 10**6])
@pytest.mark.parametrize("zeros", [0.0, 0.04, 0.06, 0.5])
@pytest.mark.parametrize("rules", RULES)
def test_natural_zeros_are_found_from_the_counts_of_a_kernel(rules, zeros, look, llama, calibration, monkeypatch):
    """Samples, decisions and shares are those of plain torch, wherever the zeros begin."""
    monkeypatch.setattr(natural_zeros, "LOOK", look)
    calibrated = CalibratedModel(llama, calibration)
    plan = Plan(RULES[rules](calibrated), "x", 0.5, 0.5, calibrated.model_fingerprint)
    rows = torch.randint(3, 97, (11, 16), generator=torch.Generator().manual_seed(7)).split((4, 4, 3))
    calls = []

    def thin(module, args):
        calls.append(1)
        x = args[0].clone()
        x[..., : round(zeros * x.shape[-1]) if len(calls) % 3 else 0] = 0.0  # not in every forward
        return (x,)

    projections = [layer.self_attn.o_proj for layer in llama.model.layers] + [llama.model.layers[1].self_attn.k_proj]
    handles = [module.register_forward_pre_hook(thin) for module in projections]
    found = []
    for together in (False, True):
        calls.clear()
        with monkeypatch.context() as patch:
            if together:
                patch.setattr(layers, "masked_and_counted", counting)
                patch.setattr(layers, "counted_unmasked", counting_unmasked)
            meter = Meter()
            with torch.inference_mode(), plan.applied(llama, AllButFirst(1), meter):
                for ids in rows:
                    llama(ids)
            found.append((meter.byte_sparsity(), meter.site_sparsity(), meter._natural.few, meter._natural.sites))
    for handle in handles:
        handle.remove()
    assert found[1] == found[0]


def test_what_is_added_up_already_is_counted_again(llama, ids):
    """A mask that is read in a forward after its own, which nothing does today."""
    decoder, tokens = Decoder.of(llama), ids.shape[0] * (ids.shape[1] - 1)
    rules = {Site(0, role): Rule(threshold=0.5) for role in ("q", "k")}
    selection = Selection(1, shape=tuple(ids.shape))
    kept, counts = torch.ones(*ids.shape, 32), torch.full((*ids.shape, 1), 8, dtype=torch.int32)
    meter = Meter()
    meter.open(decoder, rules)
    meter.count_tokens(tokens)
    share = meter.record(Site(0, "q"), kept, selection, None, counts)
    meter.count_tokens(0)
    meter.record(Site(0, "k"), kept, selection, share, counts)
    assert [meter.site_sparsity()[site] for site in rules] == [0.75, 0.75]
