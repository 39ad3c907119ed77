"""The output layer in a weight format: its codes, the embedding that it was tied to, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from families import SMALL
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from resting.sparsifier import CalibratedModel, Calibration, Decoder, SparsifierError
from resting.sparsifier.fingerprint import of_model
from resting.sparsifier.quantised.compensated import quantise_compensated
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import codes_of, head_codes_of, quantise, same_codes, take_codes
from resting.sparsifier.quantised.nearest import quantised

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def tied(is_tied=True, **more):
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL | {"vocab_size": 96, "tie_word_embeddings": is_tied} | more)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("int8-head", Format(8, 128, head=True)),
        ("int4-g32-zero-head", Format(4, 32, True, head=True)),
        ("int4-g32-head-gptq", Format(4, 32, compensated=True, head=True)),
    ],
)
def test_names(name, format):
    assert Format.parse(name) == format
    assert format.name == name
    assert format.stored.name == name.removesuffix("-gptq")
    with pytest.raises(SparsifierError, match="there is no weight format 'int4-g32-gptq-head'"):
        Format.parse("int4-g32-gptq-head")


@pytest.mark.parametrize("is_tied", [True, False])
def test_the_embedding_stays_and_the_output_layer_has_codes(is_tied):
    model, plain = tied(is_tied), tied(is_tied)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == is_tied
    form = Format.parse("int8-g16-head")
    quantise(model, form)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)
    wanted = quantised(plain.lm_head.weight, form)
    held = head_codes_of(model)
    assert torch.equal(held.codes, wanted.codes)
    assert torch.equal(model.lm_head.weight, wanted.dequantised().T)
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        assert torch.allclose(model(IDS).logits, hidden @ wanted.dequantised(), atol=1e-5)
    others = [site for site, _ in codes_of(model)[1].items()]
    assert others == list(Decoder.of(model).matrices)
    without = tied(is_tied)
    quantise(without, Format.parse("int8-g16"))
    assert head_codes_of(without) is None
    assert torch.equal(without.lm_head.weight, plain.lm_head.weight)


def test_nothing_ties_them_again(tmp_path):
    model = tied()
    quantise(model, Format.parse("int8-g16-head"))
    before = model.lm_head.weight.clone()
    other = copy.deepcopy(model)
    same_codes(model, other)
    assert torch.equal(head_codes_of(other).codes, head_codes_of(model).codes)
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, before)
    assert not torch.equal(model.model.embed_tokens.weight, before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, before)
    assert torch.equal(again.model.embed_tokens.weight, model.model.embed_tokens.weight)


def test_codes_are_the_same_in_bfloat16():
    wide, narrow = tied(), tied().bfloat16()
    quantise(wide, Format.parse("int8-g16-head"))
    take_codes(narrow, wide)
    assert narrow.lm_head.weight is not narrow.model.embed_tokens.weight
    assert torch.equal(head_codes_of(narrow).codes, head_codes_of(wide).codes)
    assert of_model(narrow) == of_model(wide)


def test_with_compensated_codes_the_output_layer_has_the_nearest():
    model, plain = tied(), tied()
    calibration = Calibration(torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(1)))
    form = Format.parse("int8-g16-head-gptq")
    quantise_compensated(CalibratedModel(model, calibration), form)
    assert torch.equal(head_codes_of(model).codes, quantised(plain.lm_head.weight, form).codes)
    assert torch.equal(model.model.embed_tokens.weight, plain.model.embed_tokens.weight)


def test_weights_that_were_changed_are_refused():
    model = tied()
    quantise(model, Format.parse("int8-g16-head"))
    with torch.no_grad():
        model.lm_head.weight.mul_(2.0)
    with pytest.raises(
        SparsifierError, match="weights of the output layer were changed after they were stored as int8"
    ):
        head_codes_of(model)


def test_what_cannot_be_stored_is_refused_and_nothing_changes():
    model = tied(vocab_size=97)
    before = of_model(model)
    with pytest.raises(
        SparsifierError, match="every 16 outputs, which does not divide the 97 of the output layer; allow"
    ):
        quantise(model, Format.parse("int8-g16-head"))
    model = tied()

    class Scaled(nn.Linear):
        pass

    model.lm_head.__class__ = Scaled
    with pytest.raises(SparsifierError, match=r"a plain linear one, and is Scaled; allowed: int8-g16$"):
        quantise(model, Format.parse("int8-g16-head"))
    assert of_model(tied(vocab_size=97)) == before
    assert of_model(model) == of_model(tied())
