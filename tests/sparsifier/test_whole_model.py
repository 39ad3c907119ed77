"""What is measured is the whole model: all matrices of a block, every token once, and all exact zeros."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from families import build
from torch import nn

from resting.baselines.dense import Dense
from resting.baselines.teal import Teal
from resting.sparsifier import (
    AllButFirst,
    Calibration,
    Decoder,
    LastFraction,
    Meter,
    Plan,
    Rule,
    Site,
    SparsifierError,
    UnsupportedModelError,
)
from resting.sparsifier.fingerprint import of_model
from resting.sparsifier.policy import Selection

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
IDS = torch.randint(3, 97, (2, 12), generator=torch.Generator().manual_seed(3))


def plan_of(model, rules):
    return Plan(rules, "x", 0.3, 0.3, of_model(model))


def test_a_matrix_that_no_role_covers_is_dense_and_counted():
    model = build("llama")
    elements = Decoder.of(model).elements
    model.model.layers[1].self_attn.adapter = nn.Linear(32, 4)
    decoder = Decoder.of(model)
    assert decoder.found[1].dense == {"self_attn.adapter.weight": 128}
    assert decoder.elements == elements + 128
    assert decoder.covered == pytest.approx(elements / (elements + 128))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda b: delattr(b.self_attn, "o_proj"), "role 'o' is missing beside q_proj"),
        (lambda b: delattr(b.mlp, "down_proj"), "role 'down' is missing beside gate_proj"),
        (lambda b: b.self_attn.add_module("wq", nn.Linear(32, 32)), "role 'q' is doubled: q_proj and wq"),
        (lambda b: b.add_module("mlp2", copy.deepcopy(b.mlp)), "role .* is doubled: it has more than one MLP"),
        (
            lambda b: b.mlp.add_module("up_proj", nn.Bilinear(2, 3, 4)),
            "role 'up' is of an unknown kind: up_proj is a Bil",
        ),
        (lambda b: b.mlp.add_module("up_proj", nn.Linear(32, 40)), r"an MLP of an unknown kind: .* up_proj \[40, 32\]"),
        (lambda b: b.self_attn.add_module("k_proj", nn.Linear(16, 16)), "q_proj has 32 inputs and k_proj has 16"),
        (
            lambda b: b.mlp.add_module("more", nn.ModuleList([nn.Linear(2, 2)])),
            "mlp.more is a list of modules with matr",
        ),
    ],
)
def test_a_refusal_names_block_and_role(change, said):
    model = build("llama")
    change(model.model.layers[1])
    with pytest.raises(UnsupportedModelError, match=f"block 1 of LlamaForCausalLM is refused: {said}"):
        Teal(target=0.3).fit(model, Calibration(IDS))


class Flat(nn.Module):
    """An MLP that is called with all tokens in one row, as mixtures call theirs."""

    def __init__(self, mlp, part=slice(None)):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = (
            mlp.gate_proj,
            mlp.up_proj,
            mlp.down_proj,
            mlp.act_fn,
        )
        self.part = part

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])[self.part]
        y = self.down_proj(self.act_fn(self.gate_proj(flat)) * self.up_proj(flat))
        return torch.cat([y, torch.zeros(x.shape[0] * x.shape[1] - len(y), x.shape[-1])]).reshape(x.shape)


@pytest.mark.parametrize("policy", [AllButFirst(1), AllButFirst(0), LastFraction(0.5)], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_in_one_row_keep_their_policy(policy, padded):
    model, flat = build("llama"), build("llama")
    flat.model.layers[1].mlp = Flat(flat.model.layers[1].mlp)
    mask = torch.ones_like(IDS)
    if padded:
        mask[0, :4] = 0
    rules = {Site(b, r): Rule(threshold=0.2) for b in range(3) for r in ROLES}
    rules[Site(1, "up")] = Rule(threshold=0.2, bias=torch.linspace(0, 1, 48))
    found, meters = [], [Meter(), Meter()]
    for of, meter in zip((model, flat), meters):
        with torch.no_grad(), plan_of(of, rules).applied(of, policy, meter):
            found.append(of(input_ids=IDS, attention_mask=mask).logits[mask == 1])
    assert torch.allclose(*found, atol=1e-5)
    assert meters[0].byte_sparsity() == pytest.approx(meters[1].byte_sparsity(), abs=1e-3)


def test_some_of_the_tokens_are_refused():
    model = build("llama")
    model.model.layers[1].mlp = Flat(model.model.layers[1].mlp, slice(0, 7))
    plan = plan_of(model, {Site(1, "up"): Rule(threshold=0.2)})
    with plan.applied(model), pytest.raises(SparsifierError, match=r"\[7, 32\] in a forward of 2 x 12"):
        model(input_ids=IDS)


def test_the_zeros_of_a_relu_rest():
    """At threshold 0, at a small one and in the dense row alike: the share of `down` that numpy counts."""
    model = build("llama")
    for block in model.model.layers:
        block.mlp.act_fn = nn.ReLU()
    seen = []
    hooks = [
        b.mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0])) for b in model.model.layers
    ]
    with torch.no_grad():
        model(input_ids=IDS)
    for hook in hooks:
        hook.remove()
    zeros = [float((x[:, 1:].numpy() == 0).mean()) for x in seen]
    assert min(zeros) > 0.3
    block = sum(p.numel() for p in model.model.layers[0].parameters() if p.dim() > 1)
    share = np.mean(zeros) * 32 * 48 / block
    for rules in ({}, {Site(b, "down"): Rule() for b in range(3)}, {Site(b, "down"): Rule(1e-30) for b in range(3)}):
        meter = Meter()
        with torch.no_grad(), plan_of(model, rules).applied(model, AllButFirst(1), meter):
            model(input_ids=IDS)
        assert meter.byte_sparsity() == pytest.approx(share, rel=1e-6)
    dense = Dense(target=0.0).fit(model, Calibration(IDS))
    meter = Meter()
    with torch.no_grad(), dense.applied(model, AllButFirst(1), meter):
        model(input_ids=IDS)
    assert meter.byte_sparsity() == pytest.approx(share, rel=1e-6)


def test_a_dense_row_of_a_smooth_activation_has_no_zeros():
    meter, model = Meter(), build("llama")
    with torch.no_grad(), plan_of(model, {}).applied(model, AllButFirst(1), meter):
        model(input_ids=IDS)
    assert meter.byte_sparsity() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_negative_zero_is_not_read(dtype):
    x = torch.tensor([[[0.0, -0.0, 1.0, -1.0, float("nan"), float("inf"), 6e-8, -6e-8]]], dtype=dtype)
    assert Selection(0, shape=(1, 1)).count_kept(x) == int(torch.count_nonzero(x))
    assert Selection(0, shape=(1, 1)).count_kept(x) == 6


def gradients(model, plan, policy, checkpointing, order):
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    model.zero_grad()
    with plan.applied(model, policy):
        losses = [model(input_ids=IDS[:, :length], labels=IDS[:, :length]).loss for length in order]
        for loss in losses:
            loss.backward()
    model.gradient_checkpointing_disable()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("policy", [LastFraction(0.5), AllButFirst(1)], ids=str)
@pytest.mark.parametrize("kind", ["reentrant", "other"])
def test_a_repeated_forward_has_its_own_tokens(policy, kind):
    """Backward after another forward, of another length, under gradient checkpointing: gradients as without it."""
    model = build("llama")
    rules = {Site(b, r): Rule(threshold=0.3) for b in range(3) for r in ROLES}
    plan = plan_of(model, rules)
    wanted = gradients(model, plan, policy, None, [12, 5])
    found = gradients(model, plan, policy, kind, [12, 5])
    assert wanted.keys() == found.keys()
    assert all(torch.allclose(found[name], g, atol=1e-6) for name, g in wanted.items())


def test_a_backward_pass_after_the_context_is_refused():
    model = build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with plan_of(model, {Site(0, "q"): Rule(threshold=0.3)}).applied(model):
        loss = model(input_ids=IDS, labels=IDS).loss
    with pytest.raises(SparsifierError, match="inside the `with` block"):
        loss.backward()


def test_a_repeated_forward_is_counted_once():
    model = build("llama").train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    plan, meter = plan_of(model, {Site(0, "q"): Rule(threshold=0.3)}), Meter()
    with plan.applied(model, AllButFirst(1), meter):
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert meter.tokens == 2 * 11
