"""The step of a GPU with compiled blocks, against the masked definition in float32: on the processor without a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from decoders import FAMILIES, WITH_FORM, plan_of
from families import SMALL
from host_kernels import COMPILER, host_function
from transformers import AutoConfig, AutoModelForCausalLM

from resting.sparsifier import AllButFirst, Decoder, Rule, SparsifierError
from resting.sparsifier.decoding.cuda import products, rows
from resting.sparsifier.decoding.cuda import stream as stream_module
from resting.sparsifier.decoding.cuda.choice import COMPILED, SLOWER_AS_A_STEP, Form, in_triton
from resting.sparsifier.decoding.cuda.codes_choice import CodesForm, Layout
from resting.sparsifier.decoding.cuda.compiled import missing
from resting.sparsifier.decoding.cuda.variant import Tile
from resting.sparsifier.decoding.step import compiled_block, cuda_step
from resting.sparsifier.decoding.step.cuda_step import CudaStep
from resting.sparsifier.decoding.step.places import Places
from resting.sparsifier.decoding.step.reading import read
from resting.sparsifier.decoding.step.side_by_side import SideBySide
from resting.sparsifier.quantised.formats import Format
from resting.sparsifier.quantised.model import quantise
from resting.sparsifier.roles import ACT

ON_GPU = torch.cuda.is_available()
HERE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
pytestmark = [
    pytest.mark.skipif(not ON_GPU and COMPILER is None, reason="needs a GPU, or a C++ compiler"),
    pytest.mark.skipif(ON_GPU and missing(HERE) is not None, reason="needs compiled kernels"),
]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 16, "num_hidden_layers": 2, "sliding_window": 2}
IDS = torch.randint(3, 97, (1, 4), generator=torch.Generator().manual_seed(4)).to(HERE)
TILE = Tile(2, 16, 8)
TRIED = WITH_FORM if ON_GPU else ["llama", "qwen3", "phi3", "granite", "gemma2"]
"""The processor takes seconds for each."""
TOKENS = 4 if ON_GPU else 2
"""Where a block runs in Triton, whose interpreter takes its time."""


class Fixed(Form):
    """One tile for all launches."""

    @property
    def wins(self):
        return True

    def tile(self, *launch):
        return TILE


class FixedCodes(CodesForm):
    """One layout for all launches of codes."""

    def layout(self, *launch):
        return Layout(8, TILE)


@pytest.fixture(autouse=True)
def compiled_everywhere(monkeypatch):
    monkeypatch.setattr(compiled_block, "chosen_form", lambda *more: Fixed({}, 0.0, 0.0))
    monkeypatch.setattr(compiled_block, "chosen_codes", lambda *more: FixedCodes({}, 0.0, 1.0))
    if not ON_GPU:
        monkeypatch.setattr(compiled_block, "missing", lambda device: None)
        for module in (products, rows, stream_module):
            monkeypatch.setattr(module, "function", host_function)


def small(family):
    default = AutoConfig.for_model(family)
    few = SMALL | FAMILIES[family] | SIZES
    few = {key: value for key, value in few.items() if hasattr(default, key)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **few)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model.to(HERE, torch.bfloat16)


def step_for(model, rules):
    decoder = Decoder.of(model)
    form = read(model, decoder)
    shapes = [(block.attention.groups, block.attention.size, block.attention.size) for block in form.blocks]
    return CudaStep(model, form, decoder, rules, Places(shapes, torch.bfloat16, HERE.type))


@torch.no_grad()
def compare(model, rules, blocks, name=COMPILED, ids=IDS):
    exact = copy.deepcopy(model).float()
    with plan_of(exact, rules).applied(exact, AllButFirst(0)):
        wanted = exact(ids).logits
    with plan_of(model, rules).applied(model, AllButFirst(0)):
        library = (model(ids).logits - wanted).norm()  # what rounding alone does, masks that turn with it included
    step = step_for(model, rules)
    assert step.kernels.get(name, 0) == blocks, step.kernels
    found = [torch.cat([step(ids[:, i : i + 1], i).clone() for i in range(ids.shape[1])], 1) for _ in range(2)]
    step.restore()
    assert (found[0] - wanted).norm() < 1.5 * library + 0.01 * wanted.norm(), library / wanted.norm()
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["int8-g32", "int4-g32"])
@pytest.mark.parametrize("rests", [True, False])
def test_codes_are_multiplied_by_programs_that_vote(name, rests):
    model = small("llama")
    quantise(model, Format.parse(name))
    rules = {site: Rule(threshold=0.02) if rests else Rule() for site in Decoder.of(model).sites()}
    compare(model, rules, 2, f"{name}, voting")


@pytest.mark.parametrize("family", TRIED)
def test_every_family_is_its_definition(family):
    model = small(family)
    rules = {site: Rule(threshold=0.02) for site in Decoder.of(model).sites()}
    after = family in ("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4")
    if after and not ON_GPU:  # nothing is compiled, and test_cuda_step.py has the step that there is
        (step := step_for(model, rules)).restore()
        assert COMPILED not in step.kernels
        return
    compare(model, rules, 0 if after else 2)


def test_a_masked_gate_leaves_rows_of_up_unread():
    model = small("llama")
    sites = Decoder.of(model).sites()
    acts = {site._replace(role=ACT): Rule(threshold=0.05) for site in sites if site.role == "gate"}
    compare(model, acts, 2)


def test_shifts_biases_and_low_rank_parts_are_their_definition():
    model = small("llama")
    decoder, rules = Decoder.of(model), {}
    for i, site in enumerate(decoder.sites()):
        out, width = decoder.projection(site).weight.shape
        random = torch.Generator().manual_seed(i)
        bias = torch.randn(out, generator=random) * 0.1
        if i % 2:
            rules[site] = Rule(threshold=0.05, shift=torch.randn(width, generator=random) * 0.05, bias=bias)
        else:
            u, v = torch.randn(out, 3, generator=random) * 0.1, torch.randn(3, width, generator=random)
            rules[site] = Rule(threshold=0.3, low_rank=(u, v), bias=bias)
    compare(model, rules, 2)


def test_blocks_that_are_not_compiled_say_why_and_others_are(monkeypatch):
    model = small("llama")
    known = compiled_block.check_block
    seen = []

    def refuses_the_first(form, *more):
        seen.append(form)
        if len(seen) == 1:
            raise compiled_block.SparsifierError("this one is not taken")
        known(form, *more)

    monkeypatch.setattr(compiled_block, "check_block", refuses_the_first)
    compare(model, {site: Rule(threshold=0.02) for site in Decoder.of(model).sites()}, 1, ids=IDS[:, :TOKENS])


def test_layers_that_were_made_partly_in_inference_mode_are_refused():
    with torch.inference_mode():
        first = torch.nn.Linear(4, 4)
    with pytest.raises(SparsifierError, match="made partly in inference mode"):
        SideBySide([first, torch.nn.Linear(4, 4)])


@pytest.mark.parametrize("made_in_inference_mode", [False, True])
@pytest.mark.parametrize("wins", [True, False])
def test_blocks_are_compiled_where_the_whole_step_is_faster(monkeypatch, wins, made_in_inference_mode):
    asked = []

    def seconds(replay, device, before):
        before()
        replay()
        asked.append(None)
        return float(len(asked) if wins else -len(asked))  # of the compiled step first

    monkeypatch.setattr(cuda_step, "is_timed", lambda device: True)
    monkeypatch.setattr(cuda_step, "seconds_of", seconds)
    monkeypatch.setattr(cuda_step, "remembered", lambda kind, what, device, measure: measure())
    with torch.inference_mode(made_in_inference_mode):
        model = small("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rules = {site: Rule(threshold=0.02) for site in Decoder.of(model).sites()}
    step = step_for(model, rules)
    ids = IDS[:, :TOKENS]
    found = torch.cat([step(ids[:, i : i + 1], i).clone() for i in range(ids.shape[1])], 1)
    assert len(asked) == 2
    assert step.kernels == ({COMPILED: 2} if wins else {in_triton(SLOWER_AS_A_STEP): 2})
    with plan_of(model, rules).applied(model, AllButFirst(0)), torch.no_grad():
        wanted = model(ids).logits
    assert (found - wanted).norm() < 0.3 * wanted.norm()
    step.restore()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.is_inference() == made_in_inference_mode for parameter in model.parameters())
