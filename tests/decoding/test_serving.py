"""What a model answers while a step serves its single tokens: always what the model itself answers."""

from __future__ import annotations

import copy
import functools
import inspect
from contextlib import nullcontext

import pytest
import torch
from decoders import masks
from plain_step import PlainStep, stepping, tiny
from torch import nn
from transformers import DynamicCache, LogitsProcessorList, MinLengthLogitsProcessor, StaticCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast

from resting.sparsifier import Decoder
from resting.sparsifier.decoding.step.arguments import LateCheck
from resting.sparsifier.decoding.step.serving import served
from resting.sparsifier.decoding.step.stored_layer import StoredLayer
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.installing import installed
from resting.sparsifier.policy import AllButFirst, DecodeOnly
from resting.sparsifier.token_tracker import TokenTracker

FAMILIES = ("llama", "mistral", "gemma3_text", "qwen3")
IDS = torch.randint(3, 97, (1, 40), generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def models():
    return {family: tiny(family) for family in FAMILIES}


@pytest.fixture
def llama(models):
    return models["llama"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def equal(found, expected) -> None:
    torch.testing.assert_close(found, expected, **CLOSE)


def generated(model, prompt: int = 9, new: int = 8, seed: int = 0, **settings):
    torch.manual_seed(seed)
    settings = {"max_new_tokens": new, "do_sample": False} | settings
    return model.generate(IDS[:, :prompt], return_dict_in_generate=True, output_logits=True, **settings)


def same_generation(found, expected) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == len(expected.logits)
    equal(torch.stack(found.logits), torch.stack(expected.logits))


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


class Turn:
    """A cache of nine tokens, of `model`, and a call of the tenth."""

    def __init__(self, model, context=None):
        self.model = model
        self.cache = model(IDS[:, :9], use_cache=True).past_key_values

    def __call__(self, *args, **kwargs):
        return self.model(*args, **({"past_key_values": self.cache} | kwargs))


TOKEN = IDS[:, 9:10]
ONES = torch.ones(1, 10, dtype=torch.long)
STEPPED = {
    "by position": lambda turn: turn(TOKEN),
    "by name": lambda turn: turn(input_ids=TOKEN, use_cache=True, return_dict=True),
    "all by position": lambda turn: turn.model(TOKEN, ONES, torch.tensor([[9]]), turn.cache),
    "mask": lambda turn: turn(TOKEN, attention_mask=ONES),
    "mask of bools": lambda turn: turn(TOKEN, attention_mask=ONES.bool()),
    "positions": lambda turn: turn(TOKEN, position_ids=torch.tensor([[9]])),
    "nothing asked": lambda turn: turn(TOKEN, labels=None, inputs_embeds=None, output_attentions=False),
    "last logits": lambda turn: turn(TOKEN, logits_to_keep=1),
    "tuple": lambda turn: turn(TOKEN, return_dict=False),
}
HIDDEN = torch.cat([torch.zeros(1, 2, dtype=torch.long), ONES[:, 2:]], 1)
DEFINED = {
    "left padding": lambda turn: turn(TOKEN, attention_mask=HIDDEN),
    "hidden in the middle": lambda turn: turn(TOKEN, attention_mask=ONES * (torch.arange(10) != 4)),
    "another position": lambda turn: turn(TOKEN, position_ids=torch.tensor([[7]])),
    "mask of four dimensions": lambda turn: turn(TOKEN, attention_mask=torch.zeros(1, 1, 1, 10)),
    "no cache": lambda turn: turn.model(TOKEN),
    "cache not used": lambda turn: turn(TOKEN, use_cache=False),
    "two tokens": lambda turn: turn(IDS[:, 9:11]),
    "a longer mask": lambda turn: turn(TOKEN, attention_mask=torch.ones(1, 12, dtype=torch.long)),
    "no logits": lambda turn: turn(TOKEN, logits_to_keep=-1),
    "embeddings": lambda turn: turn(inputs_embeds=turn.model.get_input_embeddings()(TOKEN)),
    "labels": lambda turn: turn(TOKEN, labels=TOKEN),
    "hidden states": lambda turn: turn(TOKEN, output_hidden_states=True),
    "chosen hidden states": lambda turn: turn(TOKEN, output_hidden_states=[0]),
    "chosen logits": lambda turn: turn(TOKEN, logits_to_keep=torch.tensor([0])),
    "int32": lambda turn: turn(TOKEN.int()),
}


def values(output):
    """All tensors of an output, but those of the cache."""
    if isinstance(output, tuple):
        return [o for o in output if isinstance(o, torch.Tensor)]
    flat = []
    for name, value in output.items():
        if name != "past_key_values":
            flat += value if isinstance(value, tuple) else [value]
    return flat


@pytest.mark.parametrize("name", [*STEPPED, *DEFINED])
@pytest.mark.parametrize("held", [False, True])
def test_calls_are_answered_as_by_the_model_alone(llama, name, held):
    call, results = (STEPPED | DEFINED)[name], []
    for context in (nullcontext(), stepping(llama)):
        with context as step:
            turn = Turn(llama)
            if held:
                turn.cache.crop(-1)
                turn(IDS[:, 8:9])  # the store has it already
            before = len(step.calls) if step else 0
            output = call(turn)
            after = turn(IDS[:, 30:31]).logits
            results.append((output, after, turn.cache.get_seq_length()))
            count = len(step.calls) - before if step else 0
    (found, found_after, length), (expected, expected_after, expected_length) = results[1], results[0]
    assert type(found) is type(expected)
    assert len(values(found)) == len(values(expected))
    for ours, theirs in zip(values(found), values(expected)):
        torch.testing.assert_close(ours, theirs, equal_nan=True, **CLOSE)
    equal(found_after, expected_after)
    assert length == expected_length
    assert count == (2 if name in STEPPED else 1)
    if isinstance(found, CausalLMOutputWithPast):
        assert found.keys() == expected.keys()
        assert name == "no cache" or found.past_key_values is turn.cache


def test_wrong_arguments_are_refused_as_by_the_model(llama):
    with stepping(llama):
        turn = Turn(llama)
        with pytest.raises(TypeError):
            llama(TOKEN, input_ids=TOKEN, past_key_values=turn.cache)
        with pytest.raises(TypeError):
            llama(*[None] * 30)


def test_a_padded_prompt_is_computed_by_the_definition(llama):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
    expected = generated(llama, attention_mask=mask)
    static = generated(llama, attention_mask=mask, cache_implementation="static")
    with stepping(llama) as step:
        same_generation(generated(llama, attention_mask=mask), expected)
        same_generation(generated(llama, attention_mask=mask, cache_implementation="static"), static)
    assert not step.calls


def test_a_batch_is_computed_by_the_definition(llama):
    ids = IDS[:, :20].view(2, 10)
    expected = llama.generate(ids, max_new_tokens=4, do_sample=False)
    with stepping(llama) as step:
        assert torch.equal(llama.generate(ids, max_new_tokens=4, do_sample=False), expected)
    assert not step.calls


@pytest.mark.parametrize("own_mask", [False, True])
def test_a_static_cache_of_ones_own(models, own_mask):
    """Its masks have four dimensions and its own length: the step takes calls without one."""
    model, results = models["llama"], []
    mask = torch.where(torch.arange(24) <= 9, 0.0, torch.finfo(torch.float32).min).view(1, 1, 1, 24)
    for context in (nullcontext(), stepping(model)):
        with context as step:
            cache = StaticCache(model.config, max_cache_len=24)
            model(IDS[:, :9], past_key_values=cache)
            more = {"attention_mask": mask, "position_ids": torch.tensor([[9]])} if own_mask else {}
            logits = [model(TOKEN, past_key_values=cache, **more).logits]
            logits += [model(IDS[:, i : i + 1], past_key_values=cache).logits for i in (10, 11)]
            logits.append(model(IDS[:, 12:15], past_key_values=cache).logits)
            results.append(torch.cat(logits, 1))
    equal(results[1], results[0])
    assert step.calls == ([10, 11] if own_mask else [9, 10, 11])
    assert all(type(layer) is StaticLayer for layer in cache.layers)
    assert cache.is_compileable


@pytest.mark.parametrize("where", ["layers", "config"])
def test_hidden_states_may_be_asked_for_between_steps(llama, where):
    with stepping(llama) as step:
        turn = Turn(llama)
        if where == "layers":
            assert len(turn(TOKEN, output_hidden_states=True).hidden_states) == 4
        else:
            llama.config.output_hidden_states = True
            try:
                assert len(turn(TOKEN).hidden_states) == 4
            finally:
                llama.config.output_hidden_states = False
        assert turn(IDS[:, 10:11]).hidden_states is None
    assert step.calls == [10]


def test_gradients_training_and_autocast_are_the_definitions(llama):
    with stepping(llama) as step:
        turn = Turn(llama)
        with torch.enable_grad():
            logits = turn(TOKEN).logits
            assert logits.requires_grad
        turn = Turn(llama)
        with torch.autocast("cpu", torch.bfloat16):
            turn(TOKEN)
        turn = Turn(llama)
        llama.train()
        turn(TOKEN)
        llama.eval()
        assert not step.calls
        for parameter in llama.parameters():
            parameter.requires_grad_(False)
        with torch.enable_grad():
            turn = Turn(llama)
            assert not turn(TOKEN).logits.requires_grad
        for parameter in llama.parameters():
            parameter.requires_grad_(True)
        assert step.calls == [9]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_modes_may_change_between_calls(llama, mode):
    expected = generated(llama, new=4)
    with torch.inference_mode(), stepping(llama) as step:
        cache = llama(IDS[:, :9], use_cache=True).past_key_values
        llama(TOKEN, past_key_values=cache)
    with stepping(llama) as step, mode():
        same_generation(generated(llama, new=4), expected)
        turn = Turn(llama)
        turn(TOKEN)
    assert len(step.calls) == 4
    turn(IDS[:, 10:11])


def test_hooks_inside_see_every_token_and_those_on_the_model_do_not_stop_steps(llama):
    seen, outer = [], []
    with stepping(llama) as step:
        turn = Turn(llama)
        handle = llama.register_forward_hook(lambda module, args, output: outer.append(output.logits.shape))
        turn(TOKEN)
        assert step.calls == [9]
        inner = llama.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        turn(IDS[:, 10:11])
        turn(IDS[:, 11:12])
        inner.remove()
        turn(IDS[:, 12:13])
        everywhere = nn.modules.module.register_module_forward_hook(lambda *args: None)
        turn(IDS[:, 13:14])
        everywhere.remove()
        llama.model.norm.forward = functools.partial(llama.model.norm.forward)
        llama.register_forward_hook(lambda *args: None).remove()
        turn(IDS[:, 14:15])
        del llama.model.norm.forward
        llama.model.norm.forward = llama.model.norm.forward  # as transformers 5.0 leaves it
        turn(IDS[:, 15:16])
        del llama.model.norm.forward
        handle.remove()
    assert step.calls == [9, 12, 15]
    assert len(seen) == 2
    assert len(outer) == 7


def test_hooks_from_before_the_block_count(llama):
    seen = []
    handle = llama.lm_head.register_forward_pre_hook(lambda module, args: seen.append(1))
    with stepping(llama) as step:
        Turn(llama)(TOKEN)
    handle.remove()
    assert not step.calls
    assert len(seen) == 2


class CopyingStep(PlainStep):
    """Has copies of the weights, as graphs have, until it is told to read them again."""

    def __init__(self, model):
        super().__init__(model)
        self.model, self.copy = model, tiny("llama")
        self.own = self.copy.forward
        self.renew()

    def renew(self):
        super().renew()
        self.copy.load_state_dict(self.model.state_dict())


def written(model):
    model.model.layers[1].mlp.down_proj.weight.mul_(1.5)


def moved(model):
    weight = model.model.layers[0].self_attn.v_proj.weight
    weight.data = weight.data * 0.5


def replaced(model):
    model.lm_head.weight = nn.Parameter(model.lm_head.weight * 2.0)


def loaded(model):
    model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})


@pytest.mark.parametrize("change", [written, moved, replaced, loaded])
@pytest.mark.parametrize("looks_after", [False, True])
def test_weights_that_were_changed_are_read_again(change, looks_after):
    results = []
    for inside in (False, True):
        model = tiny("llama")
        step = CopyingStep(model)
        with served(model, step, AllButFirst(1)) if inside else nullcontext() as answers:
            if inside:
                answers._waits = answers._looks_first = not looks_after
            turn = Turn(model)
            logits = [turn(TOKEN).logits]
            change(model)
            logits += [turn(IDS[:, i : i + 1]).logits for i in (10, 11)]
            results.append(torch.cat(logits, 1))
    equal(results[1], results[0])
    assert (results[0][:, 1] - results[0][:, 0]).abs().max() > 1e-3
    assert step.renewed == 2  # once when it was made
    assert step.calls == ([9, 10, 10, 11] if looks_after else [9, 10, 11])


@pytest.mark.parametrize("looks_after", [False, True])
def test_exchanged_modules_are_computed_by_the_definition(looks_after):
    model = tiny("llama")
    step = PlainStep(model)
    with served(model, step, AllButFirst(1)) as answers:
        answers._waits = answers._looks_first = not looks_after
        turn = Turn(model)
        turn(TOKEN)
        before = model.model.layers[1].mlp
        model.model.layers[1].mlp = nn.Identity()
        turn(IDS[:, 10:11])
        turn(IDS[:, 11:12])
        model.model.layers[1].mlp = before
        turn(IDS[:, 12:13])
        head = model.lm_head._parameters.pop("weight")
        with pytest.raises(AttributeError):  # as without the step
            turn(IDS[:, 13:14])
        turn.cache.crop(13 - turn.cache.get_seq_length())
        model.lm_head._parameters["weight"] = head
        model.double()
        assert turn(IDS[:, 13:14]).logits.dtype == torch.float64
        turn.cache = model(IDS[:, :9], use_cache=True).past_key_values
        assert turn(TOKEN).logits.dtype == torch.float64
    assert answers.steps == 2
    assert not step.renewed
    assert step.calls == ([9, 10, 12, 13, 13] if looks_after else [9, 12])


def test_dense_tokens_are_computed_by_the_definition(llama):
    with stepping(llama, tokens=DecodeOnly(11)) as step:
        turn = Turn(llama)
        for i in range(9, 13):
            turn(IDS[:, i : i + 1])
    assert step.calls == [11, 12]


def test_a_sequence_beyond_the_limit_is_refused(llama):
    with stepping(llama, limit=16) as step:
        with pytest.raises(SparsifierError, match=r"17 tokens .* the 16 "):
            generated(llama, 9, new=30)
        assert step.calls == list(range(9, 16))
        with pytest.raises(SparsifierError, match=r"20 tokens .* the 16 "):
            generated(llama, 20, new=2)
        with pytest.raises(SparsifierError, match=r"17 tokens .* the 16 "):
            generated(llama, 16, new=2, cache_implementation="static")
        llama(IDS)  # nobody asked for a token after it
        llama.generate(IDS.view(2, 20), max_new_tokens=2)
        generated(llama, 9, new=8)


def test_two_contexts_one_after_the_other_and_one_in_another(llama):
    expected = generated(llama)
    assert "forward" not in llama.__dict__
    signature = inspect.signature(llama.forward)
    for _ in range(2):
        with stepping(llama) as step:
            assert inspect.signature(llama.forward) == signature
            with pytest.raises(SparsifierError, match="one plan at a time"), stepping(llama):
                pass
            same_generation(generated(llama), expected)
            assert len(step.calls) == 7
        assert "forward" not in llama.__dict__
        assert "get_compiled_call" not in llama.__dict__


def test_a_cache_of_one_context_goes_on_in_the_next(llama):
    results = []
    for inside in (False, True):
        with stepping(llama) if inside else nullcontext():
            turn = Turn(llama)
            logits = [turn(TOKEN).logits]
        with stepping(llama) if inside else nullcontext() as step:
            logits += [turn(IDS[:, i : i + 1]).logits for i in (10, 11)]
        results.append(torch.cat(logits, 1))
    equal(results[1], results[0])
    assert step.calls == [10, 11]


def test_an_error_inside_leaves_the_model_and_the_cache_as_they_were(llama):
    own = llama.forward
    llama.forward = own  # as some wrappers do
    step = PlainStep(llama)
    turn = Turn(llama)

    def fail():
        with served(llama, step, AllButFirst(1)):
            turn(TOKEN)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert step.calls == [9]
    assert llama.__dict__["forward"] is own
    del llama.forward
    assert step.restored == 1
    assert not any(isinstance(layer, StoredLayer) for layer in turn.cache.layers)
    assert turn.cache.get_seq_length() == 10


def test_a_step_that_fails_leaves_the_cache_as_it_was(llama):
    class Failing(PlainStep):
        def __call__(self, token, past):
            if past == 10:
                super().__call__(token, past)
                raise RuntimeError("out of memory")
            return super().__call__(token, past)

    step = Failing(llama)
    with served(llama, step, AllButFirst(1)):
        turn = Turn(llama)
        turn(TOKEN)
        with pytest.raises(RuntimeError, match="out of memory"):
            turn(IDS[:, 10:11])
        assert turn.cache.get_seq_length() == 10
    outside = Turn(llama)
    outside(TOKEN)
    equal(turn(IDS[:, 10:11]).logits, outside(IDS[:, 10:11]).logits)


def test_other_caches_of_a_model_are_left_alone(llama):
    class MyCache(DynamicCache):
        pass

    with stepping(llama) as step:
        cache = MyCache(config=llama.config)
        llama(IDS[:, :4], past_key_values=cache)
        llama(IDS[:, 4:5], past_key_values=cache)
        assert not step.calls
        assert not any(isinstance(layer, StoredLayer) for layer in cache.layers)


@pytest.mark.parametrize("tokens", [AllButFirst(1), AllButFirst(11), DecodeOnly()])
def test_under_a_plan_the_definition_still_knows_where_a_sequence_is(tokens):
    """Steps pass by the hook that tells layers which tokens are sparse; what follows them is counted by the cache."""
    model = tiny("mistral")
    plan, decoder, results = masks(model), Decoder.of(model), []
    for inside in (False, True):
        tracker = TokenTracker(tokens)
        handle = tracker.watch(decoder.trunk)
        with installed(decoder, plan.rules, tracker):
            step = PlainStep(model)
            with served(model, step, tokens) if inside else nullcontext():
                first = generated(model, 9, new=6)
                ids = torch.cat([first.sequences, IDS[:, 20:24]], 1)
                second = generated_from(model, ids, first.past_key_values)
                turn = Turn(model)
                logits = [turn(IDS[:, i : i + 1]).logits for i in range(9, 14)]
                results.append((first.sequences, second, torch.cat(logits, 1)))
        handle.remove()
    for ours, theirs in zip(results[1], results[0]):
        equal(ours, theirs)
    dense = max(0, 2 if tokens == AllButFirst(11) else 0)
    assert len(step.calls) == (5 - dense) + 4 + (5 - dense)


@pytest.mark.parametrize("wrong", [{"attention_mask": torch.arange(13)[None]}, {"position_ids": torch.tensor([[3]])}])
@pytest.mark.parametrize("last", [False, True])
def test_a_gpu_says_later_that_a_mask_hid_tokens(llama, wrong, last):
    """The first token after a prompt waits for its mask; later masks are looked at while the next token is made."""
    step = PlainStep(llama)
    refused = pytest.raises(SparsifierError, match="an earlier single token")

    def calls():
        with served(llama, step, AllButFirst(1)) as answers:
            late(answers)
            turn = Turn(llama)
            turn(TOKEN, attention_mask=HIDDEN)
            assert not step.calls  # the first one is not late
            turn(IDS[:, 10:11], attention_mask=torch.ones(1, 11))
            turn(IDS[:, 11:12], attention_mask=torch.ones(1, 12), position_ids=torch.tensor([[11]]))
            turn(IDS[:, 12:13], **wrong)
            assert step.calls == [10, 11, 12]
            if not last:
                with refused:
                    turn(IDS[:, 13:14])
                turn(IDS[:, 13:14])  # said once

    with refused if last else nullcontext():
        calls()
    assert "forward" not in llama.__dict__


def late(answers):
    """Lets `answers` look at masks as on a GPU."""
    answers._late = LateCheck(torch.device("cpu"))


def generated_from(model, ids, cache):
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=5, do_sample=False
    )


def test_the_first_token_after_a_second_prompt_waits_for_its_mask_again(llama):
    results = []
    for inside in (False, True):
        step = PlainStep(llama)
        with served(llama, step, AllButFirst(1)) if inside else nullcontext() as answers:
            if inside:
                late(answers)
            turn = Turn(llama)
            turn(TOKEN)
            mask = (torch.arange(15) > 1)[None].long()
            turn(IDS[:, 10:14], attention_mask=mask[:, :14])
            results.append(turn(IDS[:, 14:15], attention_mask=mask).logits)
    equal(results[1], results[0])
    assert step.calls == [9]


def test_what_a_gpu_found_wrong_stays_wrong():
    check = LateCheck(torch.device("cpu"))
    check.add({"attention_mask": torch.ones(1, 3)}, 2)
    assert not check.has_failed()
    check.add({"attention_mask": torch.zeros(1, 3)}, 2)
    check.add({"attention_mask": torch.ones(1, 4)}, 3)
    check.wait()
    assert check.has_failed()
    check.reset()
    assert not check.has_failed()


@pytest.mark.parametrize("said", [True, False])
def test_the_answer_has_the_models_own_class(said):
    """As the annotations of its forward say, or as its answers to prompts were."""
    model = tiny("mixtral")
    model.config._experts_implementation = "eager"
    if not said:
        own = model.forward
        model.forward = lambda *args, **kwargs: own(*args, **kwargs)
        model.forward.__signature__ = inspect.signature(own)
    with stepping(model) as step:
        turn = Turn(model)
        assert type(turn(TOKEN)) is MoeCausalLMOutputWithPast
    assert step.calls == [9]
    if said:
        with stepping(model) as step:
            assert type(turn(IDS[:, 10:11])) is MoeCausalLMOutputWithPast
        assert step.calls == [10]


def test_a_copy_of_a_served_model_is_a_model_of_its_own(llama):
    with stepping(llama) as step:
        other = copy.deepcopy(llama)
        other.lm_head.weight.mul_(2.0)
        cache = other(IDS[:, :9], use_cache=True).past_key_values
        found = other(TOKEN, past_key_values=cache).logits
        assert other.get_compiled_call(None).__self__ is other
        assert not step.calls
        equal(found, 2.0 * Turn(llama)(TOKEN).logits)
    assert step.calls == [9]


def test_a_model_that_is_compiled_inside_is_its_own(llama):
    torch.compiler.reset()
    with stepping(llama) as step:
        turn = Turn(llama)
        found = torch.compile(llama, backend="eager")(TOKEN, past_key_values=turn.cache).logits
        assert not step.calls
        equal(found, Turn(llama)(TOKEN).logits)
    torch.compiler.reset()


def test_gradients_through_a_second_turn(llama):
    """Of frozen weights and soft prompts: attention keeps the keys, and the next token may not write over them."""
    results = []
    for context in (nullcontext(), stepping(llama)):
        with context as step:
            turn = Turn(llama)
            turn(TOKEN)
            soft = torch.ones(1, 2, 32).requires_grad_()
            with torch.enable_grad():
                loss = turn(inputs_embeds=soft).logits.square().sum()
            turn(IDS[:, 12:13])
            results += torch.autograd.grad(loss, soft)
    equal(results[1], results[0])
    assert step.calls == [9]


def test_weights_made_in_inference_mode_are_served_too():
    with torch.inference_mode():
        model = tiny("llama")
    with stepping(model) as step:
        found = generated(model, new=4)
    same_generation(found, generated(model, new=4))
    assert step.calls == [9, 10, 11]
