"""Likelihoods of packed requests, against one sequence a forward."""

from __future__ import annotations

import pytest
import torch
from decoders import decoder_of
from families import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from likelihoods import close
from lm_eval.api.instance import Instance
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from resting.baselines.teal import Teal
from resting.benchmarks.errors import AssetError
from resting.benchmarks.quality.tasks import sharing_rows
from resting.benchmarks.quality.tasks.likelihood import Scorer
from resting.benchmarks.quality.tasks.lm import PackedLM
from resting.benchmarks.quality.tasks.packing import batches, packed
from resting.benchmarks.quality.tasks.sharing_rows import may_share_rows
from resting.sparsifier import AllButFirst, DecodeOnly, LastFraction, Meter

sequences = st.lists(
    st.lists(st.integers(3, 6), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12, unique=True
)


@settings(max_examples=200, deadline=None)
@given(sequences, st.sampled_from([0, 8, 1000]), st.sampled_from([1, 20, 500]))
def test_every_sequence_can_be_read_from_its_row(given, longest, tokens):
    packs = packed(given, longest)
    found = {}
    for batch in batches(packs, tokens):
        for row, places in enumerate(batch.places):
            for number, at in places.items():
                found[number] = tuple(batch.ids[row, at].tolist())
                assert batch.positions[row, at].tolist() == list(range(len(at)))
                assert not set(batch.branch[row, at].tolist()) - {0, max(batch.branch[row, at].tolist())}
        assert len(batch.ids) == 1 or batch.ids.numel() <= tokens
    assert found == dict(enumerate(given))
    total = sum(pack.length for pack in packs)
    assert total <= sum(len(s) for s in given)
    if longest == 0:
        assert total == sum(len(s) for s in given)


def test_choices_of_one_question_share_it():
    question = tuple(range(10, 30))
    packs = packed([(*question, 1, 2), (*question, 3), (*question, 4, 5, 6)], 100)
    assert [(pack.prefix, sorted(pack.branches)) for pack in packs] == [(question, [(1, 2), (3,), (4, 5, 6)])]


def requests(n=24, seed=0):
    """Groups of three continuations of one context, one of them a prefix of another."""
    g = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n // 3):
        context = torch.randint(3, 97, (int(torch.randint(2, 12, (), generator=g)),), generator=g).tolist()
        tail = torch.randint(3, 97, (4,), generator=g).tolist()
        made += [(context, tail[:1]), (context, tail), (context, tail[:2][::-1])]
    return made


def by_hand(model, asked, context):
    """One forward a request, all its logits."""
    answers = []
    for before, continuation in asked:
        tokens = [*before, *continuation][-(context + 1) :]
        with torch.no_grad():
            log_q = model(torch.tensor([tokens[:-1]])).logits[0].float().log_softmax(-1)[-len(continuation) :]
        nats = sum(float(log_q[i, token]) for i, token in enumerate(continuation))
        answers.append((nats, log_q.argmax(-1).tolist() == continuation))
    return answers


@pytest.mark.parametrize("may_pack", [True, False])
def test_likelihoods_are_those_of_single_forwards(llama, may_pack):
    asked = requests()
    close(Scorer(llama, 64, may_pack)(asked), by_hand(llama, asked, 64))


@pytest.mark.parametrize("tokens", [AllButFirst(1), AllButFirst(3), DecodeOnly(4), LastFraction(0.5)])
def test_a_sparse_model_answers_as_one_sequence_at_a_time(llama, calibration, tokens):
    asked = requests()
    plan = Teal(0.5).fit(llama, calibration)
    may_pack = not isinstance(tokens, LastFraction)
    with plan.applied(llama, tokens):
        close(Scorer(llama, 64, may_pack)(asked), by_hand(llama, asked, 64))


def left_unread(model, plan, sequences, scorer=None):
    """Sparse tokens, and the sum over them of the share that they leave unread."""
    meter = Meter()
    with plan.applied(model, AllButFirst(1), meter), torch.no_grad():
        if scorer:
            scorer(sequences)
        else:
            for sequence in sequences:
                model(torch.tensor([sequence]))
    return meter.tokens, meter.tokens * meter.byte_sparsity()


def test_packed_rows_leave_unread_what_their_tokens_do(llama, calibration):
    """Those of both sequences, less those of the prefix, which runs once."""
    plan = Teal(0.5).fit(llama, calibration)
    prefix, tails = [5, 6, 7, 8, 9, 10], ([11, 12, 13], [14, 15, 16, 17])
    found = left_unread(llama, plan, [(prefix, tail) for tail in tails], Scorer(llama, 64))
    whole = [left_unread(llama, plan, [[*prefix, *tail[:-1]]]) for tail in tails]
    shared = left_unread(llama, plan, [prefix])
    assert found[0] == whole[0][0] + whole[1][0] - shared[0]
    assert found[1] == pytest.approx(whole[0][1] + whole[1][1] - shared[1], rel=1e-6)


def test_packed_tokens_are_counted_once_and_padding_never(llama, calibration):
    asked = [([5, 6, 7, 8], [9]), ([5, 6, 7, 8], [10, 11]), ([20, 21], [22])]
    plan, meter = Teal(0.5).fit(llama, calibration), Meter()
    scorer = Scorer(llama, 64)
    with plan.applied(llama, AllButFirst(1), meter):
        scorer(asked)
    # Inputs: 5 6 7 8, the same and 10, 20 21: four and one packed, two.
    assert scorer.cost.tokens == 7
    assert meter.tokens == 5


def test_one_forward_for_choices_of_one_token(llama):
    asked = [([5, 6, 7], [token]) for token in (10, 11, 12, 13)]
    scorer = Scorer(llama, 64)
    close(scorer(asked), by_hand(llama, asked, 64))
    assert scorer.cost.tokens == 3


def test_what_is_too_long_loses_its_beginning(llama):
    asked = [(list(range(3, 90)), [91, 92]), ([5], [6])]
    scorer = Scorer(llama, 32)
    close(scorer(asked), by_hand(llama, asked, 32))
    assert scorer.cost.truncated == 1


@pytest.mark.parametrize(
    ("config", "slides"),
    [
        (MistralConfig(**SMALL, sliding_window=6), True),
        (MistralConfig(**SMALL, sliding_window=None), False),
        (Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=6), True),
        (Qwen2Config(**SMALL), False),
    ],
)
def test_a_sliding_window_is_not_packed(config, slides):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert may_share_rows(model) is not slides
    asked = requests(9)
    close(Scorer(model, 64, may_pack=not slides)(asked), by_hand(model, asked, 64))


@pytest.mark.parametrize(("continuation", "count"), [([], 0), ([5] * 70, 70)])
def test_continuations_that_cannot_be_scored(llama, continuation, count):
    with pytest.raises(AssetError, match=rf"request 1: a continuation must have 1 to 64 tokens, got {count} after a"):
        Scorer(llama, 64)([([5], [6]), ([5, 6], continuation)])


def words(**special):
    """A tokenizer of single words."""
    table = {word: i for i, word in enumerate(["<unk>", "a", "b", "c", "d"])}
    made = Tokenizer(WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", **special)


@pytest.mark.parametrize("special", [{"bos_token": "d"}, {"eos_token": "d"}])
def test_a_tokenizer_with_one_special_token_and_no_chat_template(llama, special):
    lm = PackedLM(llama, words(**special), Scorer(llama, 64))
    asked = [Instance("loglikelihood", {}, args, i) for i, args in enumerate([("a b", " c"), ("", "b c")])]
    close(lm.loglikelihood(asked, disable_tqdm=True), by_hand(llama, [([1, 2], [3]), ([4], [2, 3])], 64))


def test_a_tokenizer_without_special_tokens_is_refused(llama):
    with pytest.raises(AssetError, match="neither a BOS nor an EOS token"):
        PackedLM(llama, words(), Scorer(llama, 64))


SHARE = {"llama": True, "phi3": True, "opt": True, "gpt_neox": True, "deepseek_v3": True, "mixtral": True}
SHARE |= {"gpt2": False, "bloom": False, "mpt": False, "jamba": False, "falcon_h1": False, "qwen3_next": False}
SHARE |= {"nemotron_h": False, "recurrent_gemma": False}


@pytest.mark.parametrize("family", SHARE)
def test_sequences_share_rows_only_where_that_changes_nothing(family):
    model, asked = decoder_of(family), requests(9)
    assert may_share_rows(model) is SHARE[family]
    close(Scorer(model, 64, SHARE[family])(asked), by_hand(model, asked, 64))


@pytest.mark.parametrize(("first", "share"), [(40, True), (97, False)])
def test_rounding_that_blows_up_with_some_tokens_is_told_from_what_sequences_see(llama, monkeypatch, first, share):
    """Ids below `first` have hidden states that are other in every forward, as special tokens have in bfloat16."""
    generator = torch.Generator().manual_seed(0)

    def final_hidden(model, ids, *args):
        states = sharing_rows.final_hidden.of(model, ids, *args)
        return states + (ids < first)[..., None] * torch.randn(states.shape, generator=generator)

    final_hidden.of = sharing_rows.final_hidden
    monkeypatch.setattr(sharing_rows, "final_hidden", final_hidden)
    assert may_share_rows(llama) is share
