"""A decoder that was found is found again while its model is as it was, keeps nothing alive, and hides no change."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from bad_weights import BROKEN
from decoders import FAMILIES, decoder_of
from families import build
from torch import nn

from resting.baselines.teal import Teal
from resting.sparsifier import CalibratedModel, Decoder, Plan, Rule, Site, UnsupportedModelError, fingerprint
from resting.sparsifier.same_modules import Modules
from resting.sparsifier.weights import check_weights


def replace_parameter(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().clone())


def add_bias(model):
    linear = model.model.layers[0].mlp.up_proj
    linear.bias = nn.Parameter(torch.zeros(linear.out_features))


CHANGES = {
    "another parameter": replace_parameter,
    "a bias more": add_bias,
    "another module": lambda m: setattr(m.model.layers[0].mlp, "act_fn", nn.SiLU()),
    "another class": lambda m: setattr(m.model.layers[0].mlp.up_proj, "__class__", type("Other", (nn.Linear,), {})),
    "a block less": lambda m: setattr(m.model, "layers", m.model.layers[:1]),
    "a block less, in place": lambda m: m.model.layers.__delitem__(1),
    "a module more": lambda m: m.model.layers[0].mlp.add_module("extra", nn.Linear(2, 2)),
    "a module none": lambda m: setattr(m.model.layers[0], "mlp", None),
    "a buffer more": lambda m: m.model.layers[0].mlp.register_buffer("codes", torch.zeros(4, 4)),
    "another dtype": lambda m: m.half(),
    "another device": lambda m: m.to("meta"),
    "another shape": lambda m: setattr(m.lm_head.weight, "data", torch.zeros(3, 32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(change, llama):
    modules = Modules(llama)
    assert modules.are_the_same()
    CHANGES[change](llama)
    assert not modules.are_the_same()


def test_numbers_are_not_looked_at(llama):
    modules = Modules(llama)
    with torch.no_grad():
        llama.model.layers[0].mlp.up_proj.weight.add_(1.0)
    assert modules.are_the_same()


def test_what_is_exchanged_and_put_back_is_as_it_was(llama):
    modules, mlp = Modules(llama), llama.model.layers[0].mlp
    dense = mlp.up_proj
    mlp.up_proj = nn.Linear(2, 2)
    assert not modules.are_the_same()
    mlp.up_proj = dense
    assert modules.are_the_same()


def test_nothing_is_kept_alive():
    model = build("llama")
    modules = Modules(model)
    known = [weakref.ref(model), weakref.ref(model.lm_head.weight), weakref.ref(model.model.layers[0])]
    del model
    gc.collect()
    assert [one() for one in known] == [None] * 3
    assert not modules.are_the_same()


def test_a_decoder_is_found_once_while_somebody_has_it(llama):
    first = Decoder.of(llama)
    assert Decoder.of(llama) is first
    linear = llama.model.layers[0].mlp.up_proj
    before = linear.weight
    replace_parameter(llama)
    second = Decoder.of(llama)
    assert second is not first
    assert Decoder.of(llama) is second
    linear.weight = before
    assert Decoder.of(llama) is first


@pytest.mark.parametrize("name", FAMILIES)
def test_models_end_with_their_last_name_although_their_decoder_was_found(name):
    model = decoder_of(name)
    try:
        decoder = Decoder.of(model)
    except UnsupportedModelError:
        pytest.skip("refused")
    again, known = Decoder.of(model), weakref.ref(model)
    assert again.slots == decoder.slots
    del decoder, again, model
    gc.collect()
    assert known() is None


def test_a_config_of_experts_that_changed_is_seen():
    model = decoder_of("mixtral")
    decoder = Decoder.of(model)
    (site, *_) = [site for site in decoder.sites() if site.is_expert]
    model.config.num_experts_per_tok = 1
    assert Decoder.of(model).share(site) == decoder.share(site) / 2


@pytest.mark.parametrize("said", BROKEN)
def test_weights_are_refused_although_the_model_was_good_before(said, llama, calibration, monkeypatch):
    calibrated = CalibratedModel(llama, calibration)  # holds the decoder
    plan = Plan({Site(0, "q"): Rule(threshold=0.1)}, "x", 0.5, 0.5, fingerprint.of_model(llama))
    with plan.applied(llama):
        pass
    assert Decoder.of(llama) is calibrated.decoder
    BROKEN[said](llama)
    monkeypatch.setattr(fingerprint, "of_model", lambda model: plan.model)
    with pytest.raises(UnsupportedModelError) as raised, plan.applied(llama):
        pass
    assert said in str(raised.value)


class Toggled(nn.Linear):
    """A linear layer with a forward of its own, which can become something else."""

    factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor


def test_a_layer_with_a_forward_of_its_own_is_tried_every_time(llama):
    mlp = llama.model.layers[0].mlp
    own = Toggled(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    own.weight = mlp.up_proj.weight
    mlp.up_proj = own
    decoder = Decoder.of(llama)
    check_weights(decoder)
    own.factor = 2.0
    assert Decoder.of(llama) is decoder
    with pytest.raises(UnsupportedModelError, match="computes something else"):
        check_weights(decoder)


def test_a_plan_is_put_on_the_same_way_every_time(llama, calibration):
    calibrated = CalibratedModel(llama, calibration)
    plan, ids = Teal(0.5).plan_for(calibrated), torch.arange(3, 19)[None]
    dense = llama(ids).logits
    with plan.applied(llama):
        first = llama(ids).logits
    for _ in range(2):
        with plan.applied(llama):
            assert torch.equal(llama(ids).logits, first)
        assert torch.equal(llama(ids).logits, dense)
    assert not torch.equal(first, dense)
