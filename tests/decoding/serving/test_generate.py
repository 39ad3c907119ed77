"""Generation while a step serves single tokens is that of the model alone."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from plain_step import stepping, tiny
from served import FAMILIES, IDS, equal, generated, same_generation
from torch import nn
from transformers import LogitsProcessorList, MinLengthLogitsProcessor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from resting.sparsifier.decoding.step.stored_layer import StoredLayer


class Listener:
    """Keeps what is streamed to it."""

    def __init__(self):
        self.heard = []

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        self.heard.append("end")


class StopsAt(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [1, 3, 12])
def test_generate_is_the_same_and_every_token_after_the_first_is_a_step(models, family, prompt):
    model = models[family]
    expected = generated(model, prompt)
    with stepping(model) as step:
        found = generated(model, prompt)
        assert all(isinstance(layer, StoredLayer) for layer in found.past_key_values.layers)
    same_generation(found, expected)
    assert step.calls == list(range(prompt, prompt + 7))
    assert step.restored == 1


SETTINGS = {
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20},
    "processors": {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "own processor": {"logits_processor": LogitsProcessorList([MinLengthLogitsProcessor(30, 5, device="cpu")])},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([StopsAt(13)])},
    "longest": {"max_new_tokens": None, "max_length": 14},
    "end of text": {"eos_token_id": list(range(3, 50))},
    "static": {"cache_implementation": "static"},
    "no static compile": {"cache_implementation": "static", "disable_compile": True},
    "mask": {"attention_mask": torch.ones(1, 9, dtype=torch.long)},
    "static, compiled": {"cache_implementation": "static", "compile_config": "all devices"},
}


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("name", SETTINGS)
def test_generate_with_settings_is_the_same(models, family, name):
    model, settings = models[family], dict(SETTINGS[name])
    plain = {key: value for key, value in settings.items() if key != "compile_config"}
    expected = generated(model, **plain)
    if "compile_config" in settings:
        from transformers import CompileConfig

        settings["compile_config"] = CompileConfig()
        settings["compile_config"]._compile_all_devices = True
    with stepping(model) as step:
        found = generated(model, **settings)
        again = generated(model, **settings)
    same_generation(found, expected)
    same_generation(again, expected)
    assert len(step.calls) == 2 * (len(expected.logits) - 1)
    assert not hasattr(model, "_compiled_call")


def test_tokens_are_streamed_one_by_one(llama):
    heard = []
    for context in (nullcontext(), stepping(llama)):
        listener = Listener()
        with context:
            generated(llama, streamer=listener)
        heard.append(listener.heard)
    assert heard[0] == heard[1]
    assert len(heard[1]) == 9 + 8 + 1


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("turn", [1, 2, 9])
def test_a_second_turn_goes_on_from_the_cache(models, family, turn):
    """The new prompt goes through the definition, over what steps have written; windows included."""
    model, results = models[family], []
    for context in (nullcontext(), stepping(model)):
        with context as step:
            first = generated(model, 9, new=6)
            ids = torch.cat([first.sequences, IDS[:, 20 : 20 + turn]], 1)
            results.append(
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),  # else `generate` takes its token 0 for padding
                    past_key_values=first.past_key_values,
                    max_new_tokens=5,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            )
    same_generation(results[1], results[0])
    assert len(step.calls) == 5 + 4


@pytest.mark.parametrize("family", FAMILIES)
def test_after_the_block_a_cache_is_an_ordinary_one_and_goes_on(models, family):
    model = models[family]
    outside = model(IDS[:, :9], use_cache=True).past_key_values
    for i in range(9, 12):
        model(IDS[:, i : i + 1], past_key_values=outside)
    with stepping(model) as step:
        cache = model(IDS[:, :9], use_cache=True).past_key_values
        for i in range(9, 12):
            model(IDS[:, i : i + 1], past_key_values=cache)
        assert len(step.calls) == 3
    kinds = {type(layer) for layer in cache.layers}
    assert kinds <= {DynamicLayer, DynamicSlidingWindowLayer}
    for ours, theirs in zip(cache.layers, outside.layers):
        assert type(ours) is type(theirs)
        equal(ours.keys, theirs.keys)
        equal(ours.values, theirs.values)
    for start, end in ((12, 13), (13, 20), (20, 21)):
        found, expected = (model(IDS[:, start:end], past_key_values=c).logits for c in (cache, outside))
        equal(found, expected)
    assert len(step.calls) == 3


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": "self"}, {"num_beams": 3}])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_generation_of_several_tokens_or_sequences_at_once_is_the_same(models, family, settings):
    model = models[family]
    settings = dict(settings)
    if "assistant_model" in settings:
        settings["assistant_model"] = tiny(family, seed=0, num_hidden_layers=3)
        nn.init.normal_(settings["assistant_model"].lm_head.weight, 0.0, 0.3)  # accepted at times
    ids = IDS[:, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    results = []
    for context in (nullcontext(), stepping(model)):
        with context as step:
            results.append(model.generate(ids, max_new_tokens=12, do_sample=False, **settings))
    assert torch.equal(*results)
    if "num_beams" in settings:
        assert not step.calls


def test_two_caches_in_turn(models):
    model = models["mistral"]
    results = []
    for context in (nullcontext(), stepping(model)):
        with context as step:
            one = model(IDS[:, :9], use_cache=True).past_key_values
            other = model(IDS[:, 20:24], use_cache=True).past_key_values
            logits = []
            for i in range(3):
                logits.append(model(IDS[:, 9 + i : 10 + i], past_key_values=one).logits)
                logits.append(model(IDS[:, 24 + i : 25 + i], past_key_values=other).logits)
            logits.append(model(IDS[:, 30:34], past_key_values=one).logits[:, -1:])
            results.append(torch.cat(logits, 1))
    equal(results[1], results[0])
    assert step.calls == [9, 4, 10, 5, 11, 6]


def test_a_copy_of_a_cache_is_another_branch(llama):
    results = []
    for context in (nullcontext(), stepping(llama)):
        with context as step:
            one = llama(IDS[:, :9], use_cache=True).past_key_values
            llama(IDS[:, 9:10], past_key_values=one)
            other = copy.deepcopy(one)
            logits = [
                llama(IDS[:, i : i + 1], past_key_values=c).logits for i, c in ((10, one), (20, other), (11, one))
            ]
            results.append(torch.cat(logits, 1))
    equal(results[1], results[0])
    assert step.calls == [9, 10, 10, 11]


def test_a_sequence_grows_beyond_the_first_places(models):
    model = models["mistral"]
    ids = torch.randint(3, 97, (1, 270), generator=torch.Generator().manual_seed(6))
    cache = model(ids[:, :250], use_cache=True).past_key_values
    expected = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(250, 270)], 1)
    with stepping(model) as step:
        cache = model(ids[:, :250], use_cache=True).past_key_values
        found = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(250, 270)], 1)
    equal(found, expected)
    assert step.calls == list(range(250, 270))
    assert step.store.version == 1


def test_logits_are_not_overwritten_by_the_next_token(llama):
    with stepping(llama):
        cache = llama(IDS[:, :4], use_cache=True).past_key_values
        first = llama(IDS[:, 4:5], past_key_values=cache).logits
        kept = first.clone()
        llama(IDS[:, 5:6], past_key_values=cache)
        assert torch.equal(first, kept)
