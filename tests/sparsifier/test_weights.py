"""Weights that are not what they look like: quantised, parametrised, shared, adapted, or not there."""

from __future__ import annotations

import pytest
import torch
from bad_weights import BROKEN, exchange
from families import build

from resting.baselines.rsparse import RSparse
from resting.baselines.teal import Teal
from resting.baselines.wina import Wina
from resting.method.mean_error import MeanError
from resting.sparsifier import Decoder, Plan, Rule, Site, Statistics, UnsupportedModelError, fingerprint
from resting.sparsifier.weights import check_weights


@pytest.mark.parametrize("said", BROKEN)
def test_weights_that_are_not_plain_are_refused_by_name(said, llama, calibration, monkeypatch):
    BROKEN[said](llama)
    monkeypatch.setattr(fingerprint, "of_model", lambda model: "m")
    runs = [
        lambda: Teal(target=0.5).fit(llama, calibration),
        lambda: MeanError(Teal(target=0.5)).fit(llama, calibration),
        lambda: Wina(target=0.5).fit(llama, calibration),
        lambda: RSparse(target=0.5).fit(llama, calibration),
        lambda: Statistics.collect(llama, calibration),
        lambda: Plan({Site(0, "q"): Rule()}, "x", 0.5, 0.5, "m").applied(llama).__enter__(),
        lambda: Plan({Site(0, "q"): Rule()}, "x", 0.5, 0.5, "m").folded(llama).__enter__(),
    ]
    for run in runs:
        with pytest.raises(UnsupportedModelError) as raised:
            run()
        assert said in str(raised.value)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_plain_weights_pass(model, dtype):
    check_weights(Decoder.of(model.to(dtype)))


def test_bitsandbytes(llama, calibration):
    bnb = pytest.importorskip("bitsandbytes")

    def nf4(linear):
        out = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=False, quant_type="nf4")
        out.weight = bnb.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
        return out

    exchange(llama, nf4)
    with pytest.raises(UnsupportedModelError, match="is a Linear4bit whose weight is a Params4bit"):
        Teal(target=0.5).fit(llama, calibration)
    model = build("llama")
    exchange(model, lambda linear: bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False))
    with pytest.raises(UnsupportedModelError, match="is a Linear8bitLt whose weight is a Int8Params"):
        Teal(target=0.5).fit(model, calibration)


def test_torchao(llama, calibration):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(llama, torchao.Int8WeightOnlyConfig())
    with pytest.raises(UnsupportedModelError, match="whose weight is a Int8Tensor, not a plain tensor"):
        Teal(target=0.5).fit(llama, calibration)


def test_adapters(calibration):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    with pytest.raises(UnsupportedModelError, match="Found linear layers named: base_layer, default"):
        Teal(target=0.5).fit(adapted, calibration)
    Teal(target=0.5).fit(adapted.merge_and_unload(), calibration)
