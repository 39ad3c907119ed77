"""Folded models on disk: transformers alone computes the same from them, or they are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from families import FAMILIES, SMALL, build
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from resting.baselines.teal import Teal
from resting.method.mean_error import MeanError
from resting.sparsifier import Decoder, Plan, PlanError, Rule, Site, UnsupportedModelError, fingerprint

CAN = {
    "llama": ("q", "k", "v", "o", "gate", "up", "down"),
    "smollm3": ("q", "o", "gate", "down"),
    "qwen2": ("q", "k", "v"),
    "qwen3": ("q", "o"),
    "gemma3": ("k", "o"),
    "gemma": ("q", "o"),
    "stablelm": ("q", "v"),
}
"""Roles that a config of the family can give a bias."""
CANNOT = {
    "mistral": ("q", "o", "down"),
    "qwen2": ("o", "up", "down"),
    "qwen3": ("down",),
    "gemma3": ("down",),
    "stablelm": ("o",),
}


def made(family: str) -> torch.nn.Module:
    if family in FAMILIES:
        return build(family)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL)).eval()


def biased(model: torch.nn.Module, *roles: str, every: int = 1) -> Plan:
    """Masks at all sites of `roles`, with random biases at every so many blocks."""
    decoder, draw = Decoder.of(model), torch.Generator().manual_seed(3)
    rules = {}
    for site in decoder.sites(roles):
        bias = torch.randn(decoder.linear(site).out_features, generator=draw)
        rules[site] = Rule(threshold=0.1, bias=bias if site.block % every == 0 else None)
    return Plan(rules, "x", 0.5, 0.5, fingerprint.of_model(model))


def by_hand(model: torch.nn.Module, plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the dense model with the plan's biases added to outputs of its layers, by hooks."""
    decoder = Decoder.of(model)
    hooks = [
        decoder.linear(site).register_forward_hook(lambda m, a, y, bias=rule.bias: y + bias)
        for site, rule in plan.rules.items()
        if rule.bias is not None
    ]
    with torch.no_grad():
        out = model(ids).logits
    for hook in hooks:
        hook.remove()
    return out


@pytest.mark.parametrize(("family", "role"), [(f, role) for f, roles in CAN.items() for role in roles])
def test_what_is_exported_is_loaded_by_transformers_alone(family, role, ids, tmp_path):
    model = made(family)
    plan = biased(model, role, every=2)
    before, config = {k: v.clone() for k, v in model.state_dict().items()}, model.config.to_dict()
    masks = plan.export(model, tmp_path / "m")
    # The model comes back as it was.
    assert model.state_dict().keys() == before.keys()
    assert model.config.to_dict() == config
    assert fingerprint.of_model(model) == plan.model
    # The file holds the plan's biases, and zeros at other layers that the setting gives one.
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    names = {m: name for name, m in model.named_modules()}
    decoder = Decoder.of(model)
    for site, rule in plan.rules.items():
        key = f"{names[decoder.linear(site)]}.bias"
        own = before.get(key, torch.zeros(decoder.linear(site).out_features))
        assert torch.equal(held.pop(key), own if rule.bias is None else own + rule.bias)
    assert not any(value.any() for key, value in held.items() if key not in before)
    # Loaded without this package, it is the dense model with the biases on every token.
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        logits = loaded(ids).logits
        with plan.folded(model):
            assert torch.equal(logits, model(ids).logits)
    assert torch.allclose(logits, by_hand(model, plan, ids), atol=1e-5)
    assert not torch.allclose(logits, model(ids).logits, atol=1e-3)
    # With the masks beside it, it is sparse again.
    with torch.no_grad():
        with plan.folded(model) as here, here.applied(model):
            sparse = model(ids).logits
        for again in (masks, Plan.load(tmp_path / "m" / "masks")):
            with again.applied(loaded):
                assert torch.equal(loaded(ids).logits, sparse)


@pytest.mark.parametrize(("family", "role"), [(f, role) for f, roles in CANNOT.items() for role in roles])
def test_a_family_without_such_a_bias_is_refused_and_nothing_is_written(family, role, tmp_path):
    model = made(family)
    config = model.config.to_dict()
    with pytest.raises(
        UnsupportedModelError, match=rf"cannot be saved with a bias at model\.layers\.0\..*\.{role}_proj"
    ):
        biased(model, role).export(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
    assert model.config.to_dict() == config
    assert not any(name.endswith(f"{role}_proj.bias") for name in model.state_dict())


def test_a_fitted_plan_is_exported(llama, calibration, ids, tmp_path):
    plan = MeanError(Teal(target=0.5)).fit(llama, calibration)
    plan.export(llama, tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert (written["mlp_bias"], written["attention_bias"]) == (True, False)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, by_hand(llama, plan, ids), atol=1e-5)


def test_a_plan_without_biases_is_exported_as_the_model_it_is(tmp_path, ids):
    model = build("mistral")
    plan = Plan({Site(0, "q"): Rule(threshold=0.1)}, "x", 0.5, 0.5, fingerprint.of_model(model))
    assert plan.export(model, tmp_path / "m").model == plan.model
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_plan_of_another_model_is_not_exported(llama, tmp_path):
    plan = biased(build("llama", seed=1), "down")
    with pytest.raises(PlanError, match="fitted on model"):
        plan.export(llama, tmp_path / "m")
    with pytest.raises(PlanError, match="fitted on model"), plan.folded(llama):
        pass
    assert not (tmp_path / "m").exists()


def test_a_folded_model_is_not_saved_in_a_way_that_loses_biases(llama, tmp_path):
    plan = biased(llama, "down")
    with pytest.raises(PlanError, match=r"drops the bias at 0\.down: use plan\.export"), plan.folded(llama):
        llama.save_pretrained(tmp_path / "m")
    assert not (tmp_path / "m").exists()
    llama.save_pretrained(tmp_path / "m")  # outside of the block it is the dense model
    assert (tmp_path / "m" / "config.json").exists()


def test_a_folded_model_whose_layers_have_biases_is_saved_as_it_is(tmp_path, ids):
    model = build("qwen2")
    with torch.no_grad(), biased(model, "q").folded(model):
        model.save_pretrained(tmp_path / "m")
        folded = model(ids).logits
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()(ids).logits, folded)


def test_a_bias_beyond_the_dtype_is_refused(llama):
    model = llama.to(torch.float16)
    plan = Plan({Site(0, "down"): Rule(bias=torch.full((32,), 1e6))}, "x", 0.5, 0.5, fingerprint.of_model(model))
    with pytest.raises(PlanError, match=r"bias at 0\.down is beyond the range of float16"), plan.folded(model):
        pass
    assert model.model.layers[0].mlp.down_proj.bias is None


def test_a_failed_save_leaves_the_model_as_it_was(llama, tmp_path, monkeypatch):
    plan, config, keys = biased(llama, "down"), llama.config.to_dict(), list(llama.state_dict())

    def fails(*args, **kwargs):
        raise OSError("no space")

    monkeypatch.setattr(type(llama), "save_pretrained", fails)
    with pytest.raises(OSError, match="no space"):
        plan.export(llama, tmp_path / "m")
    assert llama.config.to_dict() == config
    assert list(llama.state_dict()) == keys
    assert fingerprint.of_model(llama) == plan.model


def test_the_folder_may_be_text(llama, tmp_path):
    biased(llama, "o").export(llama, str(tmp_path / "m"))
    assert Path(tmp_path / "m" / "masks" / "plan.json").exists()
