"""Experts: lists of MLPs, experts that few tokens come to, and what a token reads of them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from decoders import CALIBRATION, CLOSE, decoder_of, run, stepped
from torch import nn

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.teal import Teal
from resting.baselines.wina import Wina
from resting.sparsifier import Meter, SparsifierError
from resting.sparsifier.decoding import decoding


class Listed(nn.Module):
    """The experts of a mixture as a list of MLPs, called as remote code of 2024 does."""

    def __init__(self, block):
        super().__init__()
        fused, self.gate, width = block.experts, block.gate, block.experts.intermediate_dim
        self.experts = nn.ModuleList(nn.Module() for _ in range(fused.num_experts))
        for i, one in enumerate(self.experts):
            for name, weight in {
                "gate_proj": fused.gate_up_proj[i, :width],
                "up_proj": fused.gate_up_proj[i, width:],
                "down_proj": fused.down_proj[i],
            }.items():
                linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
                linear.weight = nn.Parameter(weight.detach().clone())
                one.add_module(name, linear)
            one.act_fn = fused.act_fn
            one.forward = partial(self.mlp, one)

    @staticmethod
    def mlp(one, x):
        return one.down_proj(one.act_fn(one.gate_proj(x)) * one.up_proj(x))

    def row(self, flat, token):
        return flat[token]

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights, chosen = self.gate(flat)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            token, position = torch.where(chosen == i)
            if len(token):
                out.index_add_(0, token, expert(self.row(flat, token)) * weights[token, position, None])
        return out.view(hidden_states.shape)


def test_a_list_of_experts_is_as_experts_in_one_tensor():
    fused, listed = decoder_of("mixtral"), decoder_of("mixtral")
    for layer in listed.model.layers:
        layer.mlp = Listed(layer.mlp)
    torch.testing.assert_close(run(listed), run(fused), **CLOSE)
    plan = Teal(0.3).fit(fused, CALIBRATION)
    own = Teal(0.3).fit(listed, CALIBRATION)
    assert own.nominal == pytest.approx(plan.nominal, abs=1e-6)
    for site, rule in own.rules.items():
        there = site._replace(role="gate_up") if site.is_expert and site.role in ("gate", "up") else site
        assert rule.threshold == pytest.approx(plan.rules[there].threshold, rel=1e-4)
    with plan.applied(fused, meter=(one := Meter())):
        wanted = run(fused)
    with own.applied(listed, meter=(other := Meter())):
        torch.testing.assert_close(run(listed), wanted, rtol=1e-3, atol=1e-4)
    assert other.byte_sparsity() == pytest.approx(one.byte_sparsity(), abs=1e-4)
    for method in (Cats(0.2), Chess(0.2), Wina(0.3)):
        plan = method.fit(listed, CALIBRATION)
        assert plan.info["matched"] == pytest.approx(method.target, abs=0.01)
    with own.applied(listed):
        steps = stepped(listed)
    with decoding(own, listed):
        torch.testing.assert_close(stepped(listed), steps, rtol=1e-3, atol=1e-4)


class Scaled(Listed):
    """Multiplies with the router's weight before the expert."""

    def row(self, flat, token):
        return flat[token] * 0.5


def test_experts_that_are_called_with_something_else_are_refused():
    model = decoder_of("mixtral")
    model.model.layers[0].mlp = Scaled(model.model.layers[0].mlp)
    run(model)
    with pytest.raises(SparsifierError, match="something else than rows of the hidden states"):
        Teal(0.3).fit(model, CALIBRATION)


def test_experts_that_few_tokens_come_to_have_the_statistics_of_all():
    model = decoder_of("qwen3_moe")
    with torch.no_grad():  # no token comes to the first expert
        for layer in model.model.layers:
            layer.mlp.gate.weight[0] = 0.0
            layer.mlp.gate.weight[0, :] = -100.0 * layer.mlp.gate.weight[1:].abs().sum(0)
    none, own, pooled = (Teal(0.3).fit(model, replace(CALIBRATION, expert_tokens=n)) for n in (1, 2, 10**6))
    assert pooled.info["experts_with_few_tokens"] == 12
    by_group: dict[tuple[int, str], set[float]] = {}
    for site, rule in pooled.rules.items():
        if site.is_expert:
            by_group.setdefault((site.block, site.role), set()).add(rule.threshold)
    assert all(len(found) == 1 for found in by_group.values())
    assert own.info.get("experts_with_few_tokens", 0) == none.info.get("experts_with_few_tokens", 0) < 12
    assert len({rule.threshold for site, rule in own.rules.items() if site.group == "experts.down"}) > 3
