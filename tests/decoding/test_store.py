"""Caches in a store behave as they do outside of it: transformers' own layers are the oracle."""

from __future__ import annotations

import copy
import gc
import pickle
from types import SimpleNamespace

import pytest
import torch
from plain_step import tiny
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from resting.sparsifier.decoding.step.places import FIRST
from resting.sparsifier.decoding.step.store import Store
from resting.sparsifier.decoding.step.stored_layer import StoredLayer
from resting.sparsifier.errors import SparsifierError

CONFIG = tiny("gemma3_text").config  # windows of 6 at layers 0 and 2, none at layer 1


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


LAYERS, GROUPS, SIZE, WINDOW = 3, 2, 8, 6


def store() -> Store:
    return Store([(GROUPS, SIZE, SIZE)] * LAYERS, torch.float32, "cpu")


def states(tokens: int, seed: int, batch: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    make = torch.Generator().manual_seed(seed)
    return [tuple(torch.randn(2, batch, GROUPS, tokens, SIZE, generator=make)) for _ in range(LAYERS)]


def add(cache, tokens: int, seed: int, batch: int = 1):
    """Adds tokens to `cache`, and gives what attention sees in each layer."""
    return [cache.update(k, v, i) for i, (k, v) in enumerate(states(tokens, seed, batch))]


def stepped(store: Store, cache, seed: int) -> None:
    """Adds a token as a step does."""
    past = cache.get_seq_length()
    assert store.takes(cache, past)
    store.ensure(past + 1)
    for i, (keys, values) in enumerate(states(1, seed)):
        store.keys[i][:, past], store.values[i][:, past] = keys[0, :, 0], values[0, :, 0]
    store.advance(past + 1)


CACHES = {
    "dynamic": lambda: DynamicCache(config=CONFIG),
    "without config": DynamicCache,
    "static": lambda: StaticCache(CONFIG, max_cache_len=32),
    "short static": lambda: StaticCache(CONFIG, max_cache_len=21),
}


def two(kind: str, tokens: int):
    """The same cache twice."""
    caches = CACHES[kind](), CACHES[kind]()
    for cache in caches:
        add(cache, tokens, seed=1)
    return caches


def seen(layer) -> int:
    return int(layer.get_seq_length())


def same(found, expected) -> None:
    """Compares what a next token can attend to, and how masks are made."""
    assert list(map(seen, found.layers)) == list(map(seen, expected.layers))
    for ours, theirs in zip(copy.deepcopy(found).layers, expected.layers):  # a look at the keys makes a layer leave
        last = min(seen(theirs), WINDOW - 1 if theirs.is_sliding else 10**6)
        for a, b in ((ours.keys, theirs.keys), (ours.values, theirs.values)):
            filled = min(seen(theirs), b.shape[-2]) if not isinstance(theirs, DynamicLayer) else b.shape[-2]
            mine = min(seen(ours), a.shape[-2]) if not isinstance(ours, DynamicLayer) else a.shape[-2]
            torch.testing.assert_close(a[:, :, mine - last : mine], b[:, :, filled - last : filled], rtol=0, atol=0)


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("prompt", [1, 4, 5, 6, 7, 13])
def test_a_cache_goes_into_the_store_is_stepped_and_comes_out_as_its_own_kind(kind, prompt):
    found, expected = two(kind, prompt)
    kinds, objects = [type(layer) for layer in found.layers], list(map(id, found.layers))
    keeper = store()
    assert keeper.length_of(found) == -1
    for token in range(3):
        stepped(keeper, found, seed=10 + token)
        add(expected, 1, seed=10 + token)
        assert all(type(layer) is StoredLayer for layer in found.layers)
        assert keeper.length_of(found) == found.get_seq_length() == prompt + token + 1
        same(found, expected)
    assert not found.is_compileable
    assert found.is_sliding == expected.is_sliding
    assert found.get_max_length() == expected.get_max_length()
    keeper.settle()
    assert [type(layer) for layer in found.layers] == kinds
    assert list(map(id, found.layers)) == objects
    same(found, expected)
    keeper.keys[0].fill_(float("nan"))
    for tokens, seed in ((1, 20), (3, 21), (1, 22)):  # and goes on
        assert [found.get_mask_sizes(tokens, i) for i in range(LAYERS)] == [
            expected.get_mask_sizes(tokens, i) for i in range(LAYERS)
        ]
        for ours, theirs in zip(add(found, tokens, seed), add(expected, tokens, seed)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    for ours, theirs in zip(found.layers, expected.layers):
        assert ours.__dict__.keys() == theirs.__dict__.keys()


@pytest.mark.parametrize("kind", ["dynamic", "without config"])
@pytest.mark.parametrize("prompt", [3, 5, 6, 9])
@pytest.mark.parametrize("turn", [1, 2, 4, 8])
def test_several_tokens_at_once_see_what_they_see_outside(kind, prompt, turn):
    found, expected = two(kind, prompt)
    keeper = store()
    stepped(keeper, found, seed=10)
    add(expected, 1, seed=10)
    for seed in (11, 12):
        sizes = [found.get_mask_sizes(turn, i) for i in range(LAYERS)]
        assert sizes == [expected.get_mask_sizes(turn, i) for i in range(LAYERS)]
        assert sizes == [found.get_mask_sizes(torch.arange(turn), i) for i in range(LAYERS)]  # transformers 5.0
        for ours, theirs, (length, _) in zip(add(found, turn, seed), add(expected, turn, seed), sizes):
            assert ours[0].shape[-2] == length
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        assert keeper.length_of(found) == found.get_seq_length()
        same(found, expected)
    stepped(keeper, found, seed=13)
    add(expected, 1, seed=13)
    same(found, expected)


@pytest.mark.parametrize("removed", [0, 1, 3])
@pytest.mark.parametrize("leaves", [False, True])
def test_tokens_that_were_refused_are_taken_off(removed, leaves):
    found, expected = two("dynamic", 9)
    keeper = store()
    stepped(keeper, found, seed=10)
    add(expected, 1, seed=10)
    for cache in (found, expected):
        cache.activate_past_recording()
        assert cache.is_recording_past(0)
        assert not cache.is_recording_past(1)
        add(cache, 4, seed=11)
    if leaves:
        keeper.settle()
    for cache in (found, expected):
        cache.crop(-removed)
    assert leaves or keeper.length_of(found) == 14 - removed
    for ours, theirs in zip(add(found, 2, seed=12), add(expected, 2, seed=12)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    same(found, expected)


def test_a_window_that_has_dropped_tokens_is_not_rolled_back_past_them():
    found, _ = two("dynamic", 9)
    keeper = store()
    stepped(keeper, found, seed=10)
    with pytest.raises(RuntimeError, match="does not track past states"):
        found.crop(-3)
    assert found.get_seq_length() == 10
    with pytest.raises(ValueError, match="positive"):
        found.layers[1].crop(4)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_is_done_to_a_batch_is_done_outside_of_the_store(kind):
    found, expected = two(kind, 4)
    keeper = store()
    stepped(keeper, found, seed=10)
    add(expected, 1, seed=10)
    if kind == "dynamic":
        for cache in (found, expected):
            cache.batch_repeat_interleave(3)
            cache.batch_select_indices(torch.tensor([0, 2]))
    for cache in (found, expected):
        cache.reorder_cache(torch.tensor([1, 0] if kind == "dynamic" else [0]))
    assert not any(isinstance(layer, StoredLayer) for layer in found.layers)
    same(found, expected)
    assert keeper.length_of(found) == -1
    if kind == "dynamic":
        assert not keeper.takes(found, 5)  # two sequences
        for ours, theirs in zip(add(found, 2, 11, batch=2), add(expected, 2, 11, batch=2)):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CACHES)
def test_a_cache_that_is_reset_is_empty_and_of_its_own_kind(kind):
    found, expected = two(kind, 4)
    keeper = store()
    stepped(keeper, found, seed=10)
    for cache in (found, expected):
        cache.reset()
    assert seen(found) == 0
    assert not keeper.takes(found, 0)
    for ours, theirs in zip(add(found, 3, seed=11), add(expected, 3, seed=11)):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    stepped(keeper, found, seed=12)
    add(expected, 1, seed=12)
    same(found, expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_copy_is_a_cache_of_its_own(kind, copied):
    found, expected = two(kind, 7)
    keeper = store()
    stepped(keeper, found, seed=10)
    add(expected, 1, seed=10)
    other = copied(found)
    assert not any(isinstance(layer, StoredLayer) for layer in other.layers)
    assert keeper.length_of(other) == -1
    assert keeper.length_of(found) == 8
    stepped(keeper, found, seed=11)
    same(other, expected)
    add(expected, 1, seed=11)
    same(found, expected)


def test_two_caches_in_turn_are_never_mixed():
    (one, one_outside), (two_, two_outside) = two("dynamic", 4), two("without config", 9)
    keeper = store()
    for turn in range(3):
        for cache, outside, seed in ((one, one_outside, 10 + turn), (two_, two_outside, 20 + turn)):
            stepped(keeper, cache, seed)
            add(outside, 1, seed)
    same(one, one_outside)
    same(two_, two_outside)


def test_a_layer_that_got_other_keys_leaves_the_store_and_comes_back():
    found, expected = two("without config", 4)
    keeper = store()
    stepped(keeper, found, seed=10)
    add(expected, 1, seed=10)
    for cache in (found, expected):
        cache.layers[1].keys = cache.layers[1].keys * 2
        cache.layers[2].values = cache.layers[2].values + 1
    assert [type(layer) for layer in found.layers] == [StoredLayer, DynamicLayer, DynamicLayer]
    same(found, expected)
    assert keeper.length_of(found) == -1
    stepped(keeper, found, seed=11)
    add(expected, 1, seed=11)
    same(found, expected)
    found.layers[0] = copy.deepcopy(found.layers[0])
    assert keeper.length_of(found) == -1
    stepped(keeper, found, seed=12)
    add(expected, 1, seed=12)
    same(found, expected)


def test_gradients_and_other_dtypes_are_kept_outside():
    found, _ = two("without config", 4)
    keeper = store()
    stepped(keeper, found, seed=10)
    keys = torch.randn(1, GROUPS, 1, SIZE, requires_grad=True)
    with torch.enable_grad():
        seen_keys, _ = found.update(keys, keys.detach(), 0)
        seen_keys.sum().backward()
    assert keys.grad is not None
    assert type(found.layers[0]) is DynamicLayer
    assert not keeper.takes(found, 5)
    half = DynamicCache()
    for i, (k, v) in enumerate(states(4, 1)):
        half.update(k.half(), v.half(), i)
    assert not keeper.takes(half, 4)


def test_memory_of_a_cache_that_is_gone_is_not_kept():
    found, _ = two("dynamic", 4)
    keeper = store()
    stepped(keeper, found, seed=10)
    del found
    gc.collect()
    assert keeper.length_of(SimpleNamespace(layers=[None] * LAYERS)) != 0
    keeper.settle()
    other, outside = two("dynamic", 5)
    stepped(keeper, other, seed=10)
    add(outside, 1, seed=10)
    same(other, outside)


def test_unknown_caches_are_not_taken():
    class Mine(DynamicLayer):
        pass

    class MyCache(DynamicCache):
        pass

    keeper = store()
    mine = DynamicCache()
    add(mine, 3, 1)
    mine.layers[1].__class__ = Mine
    offloaded, short, batch, own = DynamicCache(), DynamicCache(), DynamicCache(), MyCache()
    add(offloaded, 3, 1)
    offloaded.offloading = True
    add(short, 3, 1)
    short.layers.pop()
    add(batch, 3, 1, batch=2)
    add(own, 3, 1)
    uneven = DynamicCache()
    add(uneven, 3, 1)
    uneven.update(*states(1, 2)[0], 0)
    both = EncoderDecoderCache(DynamicCache(), DynamicCache())
    for cache in (mine, offloaded, short, batch, own, uneven, both, None, ((1, 2),), DynamicCache()):
        assert not keeper.takes(cache, 3)
    empty = DynamicCache(config=CONFIG)
    assert not keeper.takes(empty, 0)
    fine = DynamicCache()
    add(fine, 3, 1)
    assert not keeper.takes(fine, 4)
    assert keeper.takes(fine, 3)


def test_the_store_grows_by_doubling_and_keeps_what_it_has():
    keeper = store()
    assert [k.shape for k in keeper.keys] == [(GROUPS, FIRST, SIZE)] * LAYERS
    assert not any(k.any() for k in keeper.keys + keeper.values)
    found, expected = two("dynamic", FIRST - 1)
    stepped(keeper, found, seed=10)
    add(expected, 1, seed=10)
    assert (keeper.version, keeper.places) == (0, FIRST)
    stepped(keeper, found, seed=11)
    add(expected, 1, seed=11)
    assert (keeper.version, keeper.places) == (1, 2 * FIRST)
    same(found, expected)
    assert not keeper.keys[0][:, FIRST + 1 :].any()
    keeper.ensure(5 * FIRST)
    assert (keeper.version, keeper.places) == (2, 8 * FIRST)
    same(found, expected)


def test_room_is_made_in_inference_mode_too():
    with torch.inference_mode():
        keeper = store()
        found, expected = two("dynamic", 4)
        stepped(keeper, found, seed=10)
        keeper.ensure(FIRST + 1)
    stepped(keeper, found, seed=11)
    keeper.settle()
    add(expected, 1, seed=10)
    add(expected, 1, seed=11)
    same(found, expected)


def test_a_static_cache_holds_what_it_was_made_for():
    found = StaticCache(CONFIG, max_cache_len=6)
    add(found, 5, seed=1)
    keeper = store()
    stepped(keeper, found, seed=10)
    with pytest.raises(SparsifierError, match=r"for 6 tokens has no place for 7"):
        keeper.takes(found, 6)
    with pytest.raises((IndexError, RuntimeError)):  # as outside
        found.update(*states(1, 2)[1], 1)


def test_layers_that_are_taken_are_those_that_there_are():
    kinds = {type(layer) for kind in CACHES for layer in CACHES[kind]().layers}
    assert kinds == {DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer}
