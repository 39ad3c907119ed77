"""What is found out after a token was given, and what a served model is besides."""

from __future__ import annotations

import copy
import inspect
from contextlib import nullcontext

import pytest
import torch
from decoders import masks
from plain_step import PlainStep, stepping, tiny
from served import HIDDEN, IDS, TOKEN, Turn, equal, generated, same_generation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from resting.sparsifier import Decoder
from resting.sparsifier.decoding.step.arguments import LateCheck
from resting.sparsifier.decoding.step.serving import served
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.installing import installed
from resting.sparsifier.policy import AllButFirst, DecodeOnly
from resting.sparsifier.token_tracker import TokenTracker


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
