"""Single calls while a step serves single tokens are answered as by the model alone."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from plain_step import stepping
from served import CLOSE, HIDDEN, IDS, ONES, TOKEN, Turn, equal, generated, same_generation
from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

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
