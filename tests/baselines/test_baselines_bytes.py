"""Byte accounting of methods on the shapes of published models; no weight is allocated."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.rsparse import low_rank_budget
from resting.sparsifier import ACT, LINEAR_ROLES, Decoder, Meter, Rule, Site, TargetUnreachableError
from resting.sparsifier.allocation import coverage, uniform
from resting.sparsifier.policy import Selection

SHAPES = {  # hidden, intermediate, heads, key-value heads
    "Llama-2-7B": (4096, 11008, 32, 32),
    "Llama-2-13B": (5120, 13824, 40, 40),
    "Llama-3-8B": (4096, 14336, 32, 8),
    "Llama-2-70B": (8192, 28672, 64, 8),
    "Qwen2.5-7B": (3584, 18944, 28, 4),
}


def decoder(name, blocks=2):
    hidden, intermediate, heads, kv_heads = SHAPES[name]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        num_hidden_layers=blocks,
        vocab_size=8,
    )
    with torch.device("meta"):
        return Decoder.of(LlamaForCausalLM(config))


def kept(width, count):
    """The kept input of one token."""
    x = torch.zeros(1, 1, width)
    x[..., :count] = 1.0
    return x


def measured(blocks, rules, counts):
    """Byte sparsity of one token that keeps `counts` channels, by site."""
    meter = Meter()
    meter.open(blocks, rules)
    meter.count_tokens(1)
    for site, count in counts.items():
        width = blocks.linear(Site(site.block, "down") if site.role == ACT else site).in_features
        meter.record(site, kept(width, count), Selection(0))
    return meter.byte_sparsity()


@pytest.mark.parametrize(
    ("name", "q", "k", "down", "cats", "chess", "ceiling"),
    [
        ("Llama-2-7B", 0.0829, 0.0829, 0.2228, 0.223, 0.306, 0.446),
        ("Llama-2-13B", 0.0826, 0.0826, 0.2231, 0.223, 0.306, 0.446),
        ("Llama-3-8B", 0.0769, 0.0192, 0.2692, 0.269, 0.346, 0.538),
        ("Llama-2-70B", 0.0784, 0.0098, 0.2745, 0.275, 0.353, 0.549),
        ("Qwen2.5-7B", 0.0551, 0.0079, 0.2913, 0.291, 0.347, 0.583),
    ],
)
def test_shares_of_a_block(name, q, k, down, cats, chess, ceiling):
    blocks = decoder(name)
    total = sum(coverage(blocks, Site(0, role)) for role in LINEAR_ROLES)
    shares = {role: coverage(blocks, Site(0, role)) / total for role in (*LINEAR_ROLES, ACT)}
    expected = {"q": q, "k": k, "v": k, "o": q, "gate": down, "up": down, "down": down}
    assert {role: round(shares[role], 4) for role in LINEAR_ROLES} == expected
    masked = {roles: sum(shares[role] for role in roles) for roles in (Cats().roles, Chess(attention=True).roles)}
    assert [0.5 * share for share in masked.values()] == pytest.approx([cats, chess], abs=6e-4)
    assert shares[ACT] == pytest.approx(ceiling, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "quarter", "two_fifths"),
    [
        ("Llama-2-7B", 0.561, 0.898),
        ("Llama-2-13B", 0.560, 0.896),
        ("Llama-3-8B", 0.464, 0.743),
        ("Llama-2-70B", 0.455, 0.729),
        ("Qwen2.5-7B", 0.429, 0.686),
    ],
)
def test_the_ratio_that_cats_needs_for_a_byte_target(name, quarter, two_fifths):
    blocks = decoder(name)
    for target, ratio in ((0.25, quarter), (0.4, two_fifths)):
        ratios = uniform(blocks, Cats.roles, target)
        assert ratios == {Site(0, ACT): pytest.approx(ratio, abs=6e-4), Site(1, ACT): pytest.approx(ratio, abs=6e-4)}


def test_the_ceiling_of_cats_on_llama_2_7b_is_named():
    with pytest.raises(TargetUnreachableError, match=r"0\.5 is above this method's ceiling of 0\.446"):
        uniform(decoder("Llama-2-7B"), Cats.roles, 0.5)


@pytest.mark.parametrize(("attention", "density"), [(False, 0.7772), (True, 0.6943)])
def test_half_of_the_neurons_resting_on_llama_2_7b(attention, density):
    """CATS and CHESS at k = 0.5, as the meter counts them."""
    blocks = decoder("Llama-2-7B")
    sites = blocks.sites(Chess(attention=attention).roles)
    counts = {site: 11008 // 2 if site.role == ACT else 4096 // 2 for site in sites}
    rules = dict.fromkeys(sites, Rule(threshold=1.0))
    assert 1 - measured(blocks, rules, counts) == pytest.approx(density, abs=5e-5)


@pytest.mark.parametrize(
    ("out", "inputs", "rank"),
    [  # of Llama-3-8B at density 0.5, rho 0.95: 1945 of 4096 inputs are kept, 6809 of 14336
        (1024, 4096, 20),  # k, v: (2097152 - 1945 * 1024) / 5120 = 20.6
        (4096, 4096, 51),  # q, o: (8388608 - 1945 * 4096) / 8192 = 51.5; the authors' code has it for k and v too
        (14336, 4096, 80),  # gate, up: (29360128 - 1945 * 14336) / 18432 = 80.1
        (4096, 14336, 79),  # down: (29360128 - 6809 * 4096) / 18432 = 79.8
    ],
)
def test_the_rank_follows_from_the_true_shape(out, inputs, rank):
    assert low_rank_budget(out, inputs, density=0.5, rho=0.95) == rank


@given(
    out=st.integers(1, 5000), inputs=st.integers(1, 5000), density=st.floats(0, 1), rho=st.floats(0, 1, allow_nan=False)
)
def test_the_low_rank_budget_is_kept_and_used(out, inputs, density, rho):
    rank = low_rank_budget(out, inputs, density, rho)
    left = out * inputs * density - math.floor(inputs * density * rho) * out
    assert 1 <= rank <= min(out, inputs)
    assert rank == 1 or rank * (out + inputs) <= left + 1e-3
    assert rank == min(out, inputs) or (rank + 1) * (out + inputs) > left - 1e-3


def rsparse_rules(blocks, bias):
    rules = {}
    for site in blocks.sites():
        out, inputs = blocks.linear(site).weight.shape
        rank = low_rank_budget(out, inputs, density=0.5, rho=0.95)
        factors = torch.empty(out, rank, device="meta"), torch.empty(rank, inputs, device="meta")
        rules[site] = Rule(threshold=1.0, low_rank=factors, bias=torch.empty(out, device="meta") if bias else None)
    return rules


@pytest.mark.parametrize("bias", [False, True])
def test_low_rank_factors_and_biases_are_read(bias):
    """R-Sparse on Llama-3-8B at density 0.5: channels and factors together fill the budget; biases come on top."""
    blocks = decoder("Llama-3-8B")
    counts = {site: math.floor(blocks.linear(site).in_features * 0.475) for site in blocks.sites()}
    shapes = {"q": (4096, 4096), "k": (1024, 4096), "gate": (14336, 4096), "down": (4096, 14336)}
    read = {  # kept columns, and factors of ranks by hand (above)
        "q": 1945 * 4096 + 51 * (4096 + 4096),
        "k": 1945 * 1024 + 20 * (1024 + 4096),
        "gate": 1945 * 14336 + 80 * (14336 + 4096),
        "down": 6809 * 4096 + 79 * (14336 + 4096),
    }
    times = {"q": 2, "k": 2, "gate": 2, "down": 1}  # q and o, k and v, gate and up
    total = sum(times[role] * out * inputs for role, (out, inputs) in shapes.items())
    expected = sum(times[role] * (read[role] + bias * shapes[role][0]) for role in times) / total
    sparsity = measured(blocks, rsparse_rules(blocks, bias), counts)
    assert 1 - sparsity == pytest.approx(expected, rel=1e-9)
    assert sparsity == pytest.approx(0.5, abs=1e-3)
