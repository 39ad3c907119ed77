"""The step of a GPU in Triton's interpreter: every family and every kind of rule, against the masked definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from decoders import FAMILIES, SMALL, WITH_FORM, plan_of
from replaced import with_weights
from transformers import AutoConfig, AutoModelForCausalLM

from resting.baselines.cats import Cats
from resting.baselines.chess import Chess
from resting.baselines.rsparse import RSparse
from resting.method.mean_error import MeanError
from resting.sparsifier import AllButFirst, Calibration, Decoder, Rule, Site, SparsifierError
from resting.sparsifier.decoding import cuda_products
from resting.sparsifier.decoding.cuda_masked import Masked
from resting.sparsifier.decoding.step.cuda_step import CudaStep
from resting.sparsifier.decoding.step.places import Places
from resting.sparsifier.decoding.step.reading import read
from resting.sparsifier.decoding.step.running import UnknownFormError
from resting.sparsifier.roles import ACT

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors need Triton's interpreter")
IDS = torch.randint(3, 97, (1, 3), generator=torch.Generator().manual_seed(4))
WINDOWS = Calibration(torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(2)))


def one_block(family):
    """A model of one block, since the interpreter takes its time; a window is shorter than the text."""
    default = AutoConfig.for_model(family)
    few = SMALL | FAMILIES[family] | {"num_hidden_layers": 1, "sliding_window": 2}
    few = {key: value for key, value in few.items() if hasattr(default, key)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **few)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model


def step_for(model, rules):
    decoder = Decoder.of(model)
    form = read(model, decoder)
    shapes = [(block.attention.groups, block.attention.size, block.attention.size) for block in form.blocks]
    return CudaStep(model, form, decoder, rules, Places(shapes, torch.float32, "cpu"))


@torch.no_grad()
def compare(model, plan):
    before = {name: p.clone() for name, p in model.named_parameters()}
    with plan.applied(model, AllButFirst(0)):
        wanted = model(IDS).logits
    step = step_for(model, plan.rules)
    found = torch.cat([step(IDS[:, i : i + 1], i).clone() for i in range(IDS.shape[1])], 1)
    step.restore()
    assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))
    assert all(torch.equal(p, before[name]) and p.is_contiguous() for name, p in model.named_parameters())


@pytest.mark.parametrize("family", WITH_FORM)
def test_every_family_is_its_definition(family):
    model = one_block(family)
    sites = Decoder.of(model).sites()
    compare(model, plan_of(model, {site: Rule(threshold=0.1 + 0.05 * i) for i, site in enumerate(sites)}))


METHODS = [Cats(target=0.2), Chess(target=0.3), RSparse(target=0.4), MeanError(RSparse(target=0.4))]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.label)
def test_every_kind_of_rule_is_its_definition(method):
    model = one_block("llama")
    compare(model, method.fit(model, WINDOWS))


@pytest.mark.parametrize("method", METHODS[1:3], ids=lambda method: method.label)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_step_of_small_programs_is_its_definition(family, method, monkeypatch):
    monkeypatch.setattr(cuda_products, "form_for", lambda shape, rests: Masked(16, 16, 1, 2))
    model = one_block(family)
    compare(model, method.fit(model, WINDOWS))


def test_replaced_weights_are_their_definition():
    model = one_block("llama")
    compare(model, with_weights(model))


def test_an_act_mask_beside_a_mask_of_up_and_a_shift():
    model = one_block("qwen2")
    plan = Cats(target=0.2).fit(model, WINDOWS)
    shift = torch.linspace(-0.2, 0.2, 32)
    compare(model, replace(plan, rules=plan.rules | {Site(0, "up"): Rule(threshold=0.3, shift=shift)}))
    model = one_block("gemma2")
    compare(model, plan_of(model, {Site(0, ACT): Rule(threshold=0.05), Site(0, "q"): Rule(bias=torch.ones(32))}))


def test_what_a_step_does_not_compute_is_refused_and_leaves_the_weights():
    cases = [
        ("llama", {Site(0, "q"): Rule(topk=3)}, SparsifierError, "a rule with topk has none"),
        ("llama", {Site(0, "q"): Rule(0.5, mask="top-p")}, SparsifierError, "a rule with mask 'top-p' has none"),
        ("llama", {Site(0, "q"): Rule(0.5, rescale=True)}, SparsifierError, "a rule with rescale has no decode kernel"),
        ("phi3", {Site(0, ACT): Rule(threshold=0.1)}, UnknownFormError, "gate and up are one matrix"),
        (
            "llama",
            {Site(0, ACT): Rule(threshold=0.1), Site(0, "up"): Rule(low_rank=(torch.ones(48, 2), torch.ones(2, 32)))},
            SparsifierError,
            "a low-rank part at up, whose rows rest under an act mask",
        ),
    ]
    for family, rules, error, message in cases:
        model = one_block(family)
        with pytest.raises(error, match=message):
            step_for(model, rules)
        assert all(p.is_contiguous() for p in model.parameters())


@torch.no_grad()
def test_weights_that_were_written_to_are_read_again():
    model = one_block("llama")
    step = step_for(model, {})
    first = step(IDS[:, :1], 0).clone()
    model.model.norm.weight.mul_(2.0)
    model.lm_head.weight.data = 2.0 * model.lm_head.weight.data
    step.renew()
    assert torch.allclose(step(IDS[:, :1], 0), 4.0 * first, atol=1e-4)
    step.restore()


def test_ctrl_c_while_weights_are_laid_out_leaves_them(monkeypatch):
    model = one_block("llama")

    def stop(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("resting.sparsifier.decoding.step.cuda_block.Attention", stop)
    with pytest.raises(KeyboardInterrupt):
        step_for(model, {})
    assert all(p.is_contiguous() for p in model.parameters())


def test_narrow_layers_that_share_no_launch_decode_by_single_layers():
    default = AutoConfig.for_model("llama")
    few = {k: v for k, v in (SMALL | {"num_hidden_layers": 1, "head_dim": 10}).items() if hasattr(default, k)}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **few)).eval()
    with pytest.raises(UnknownFormError, match=r"layers of \[40, 20, 20\] outputs share no launch"):
        step_for(model, {})
