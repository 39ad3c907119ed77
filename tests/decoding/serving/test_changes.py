"""Hooks, weights and modules that change while a step serves single tokens, and contexts inside of others."""

from __future__ import annotations

import functools
import inspect
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from plain_step import PlainStep, stepping, tiny
from served import IDS, TOKEN, Turn, equal, generated, same_generation
from torch import nn
from transformers import DynamicCache

from resting.sparsifier.decoding.step.serving import served
from resting.sparsifier.decoding.step.stored_layer import StoredLayer
from resting.sparsifier.errors import SparsifierError
from resting.sparsifier.policy import AllButFirst, DecodeOnly


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


def test_a_sequence_may_be_longer_than_the_config_says(llama):
    long = llama.config.max_position_embeddings + 20
    ids = torch.randint(3, 97, (1, long), generator=torch.Generator().manual_seed(1))
    expected = llama(ids).logits[:, -4:]
    with stepping(llama) as step:
        cache = llama(ids[:, :-4], use_cache=True).past_key_values
        found = [llama(ids[:, i : i + 1], past_key_values=cache).logits for i in range(long - 4, long)]
    assert len(step.calls) == 4
    equal(torch.cat(found, 1), expected)


def test_a_forward_that_is_set_inside_is_seen(llama):
    mlp = llama.model.layers[1].mlp
    own = mlp.forward
    with stepping(llama) as step:
        turn = Turn(llama)
        before = turn(TOKEN).logits
        turn.cache.crop(-1)
        mlp.forward = lambda x: 3.0 * own(x)
        found = turn(TOKEN).logits
        del mlp.forward
    assert step.calls == [9]
    assert not torch.allclose(found, before)


def test_attention_that_is_set_inside_is_seen(llama, monkeypatch):
    with stepping(llama) as step:
        turn = Turn(llama)
        monkeypatch.setattr(llama.config, "_attn_implementation", "mine")
        with pytest.raises(KeyError):  # transformers' own answer
            turn(TOKEN)
    assert not step.calls


def test_threads_take_turns(llama):
    def text(i):
        with torch.no_grad():
            return generated(llama, 5 + i, new=30).sequences

    expected = [text(i) for i in range(2)]
    with stepping(llama), ThreadPoolExecutor(2) as pool:
        assert all(map(torch.equal, pool.map(text, range(2)), expected))


def test_keys_that_somebody_took_are_his(llama):
    with stepping(llama):
        turn = Turn(llama)
        turn(TOKEN)
        taken = [(layer.keys, layer.values) for layer in turn.cache.layers]
        before = [(keys.clone(), values.clone()) for keys, values in taken]
        generated(llama, 20, new=5)
        assert all(map(torch.equal, sum(taken, ()), sum(before, ())))
        expected = turn(IDS[:, 10:11]).logits
        equal(llama(IDS[:, 10:11], past_key_values=DynamicCache(taken)).logits, expected)


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
