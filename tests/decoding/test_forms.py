"""Forms of blocks: read off every family that has one, verified, and refused with a reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from decoders import FAMILIES, decoder_of, masks, run
from torch import nn

from resting.sparsifier import Decoder, SparsifierError
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.step import by_step, plain
from resting.sparsifier.decoding.step.by_step import known_form, step_of
from resting.sparsifier.decoding.step.form import ACTIVATIONS, Norm
from resting.sparsifier.decoding.step.reading import UnknownFormError, read, roles_of

KNOWN = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "vaultgemma", "olmo2", "olmo3"]
KNOWN += ["smollm3", "granite", "exaone4", "seed_oss", "phi3"]
REASONS = {
    "ministral3": "computes something else than its form",  # its queries are scaled by their position
    "cohere": "computes something else",  # attention and MLP side by side
    "glm": "computes something else",  # another rotary embedding
    "olmo": "no RMSNorm with a weight",
    "bitnet": "opens a gate by ReLUSquaredActivation, not by silu, gelu_tanh, gelu",
    "gpt2": "no rotary embedding",
    "phi": "block 0 has down, k, o, q, up, v: not attention and one gated MLP alone",
    "mixtral": "block 0 has k, o, q, v: not attention and one gated MLP alone",
    "deepseek_v3": "not attention and one gated MLP alone",
    "jamba": "no rotary embedding",
    "qwen3_next": "its cache holds a LinearAttentionLayer",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", KNOWN)
def test_a_family_has_a_form(family, dtype):
    model = decoder_of(family).to(dtype)
    form = read(model, Decoder.of(model))
    assert len(form.blocks) == len(Decoder.of(model).layers)
    assert {block.activation for block in form.blocks} <= set(ACTIVATIONS)


@pytest.mark.parametrize("family", REASONS)
def test_another_block_has_none_and_says_why(family):
    model = decoder_of(family)
    with pytest.raises(UnknownFormError, match=REASONS[family]):
        read(model, Decoder.of(model))


def test_no_other_family_has_a_form():
    """All that transformers builds: what is not listed above is refused, and never with another fault."""
    for family in FAMILIES.keys() - set(KNOWN) - set(REASONS):
        try:
            model = decoder_of(family)
            decoder = Decoder.of(model)
        except Exception:  # a family that is refused altogether
            continue
        with pytest.raises(UnknownFormError):
            read(model, decoder)


def fused_apart(decoder, block):
    layers = {}
    for role in roles_of(decoder, block):
        linear = decoder.linear(next(s for s in decoder.sites() if (s.block, s.role) == (block, role)))
        layers[role] = linear.weight, linear.bias
    return layers


@torch.no_grad()
def test_blocks_one_after_another_are_the_model():
    """A second opinion on what was read: the whole model from its form, in plain torch."""
    model = decoder_of("qwen3")
    decoder = Decoder.of(model)
    form = read(model, decoder)
    ids = torch.arange(3, 12)[None]
    x = model.get_input_embeddings()(ids)[0] * form.embedding_scale
    for i, block in enumerate(form.blocks):
        cos, sin = form.tables[block.attention.table](torch.arange(ids.shape[1]))
        x = plain.block(block, fused_apart(decoder, i), x, cos, sin)
    logits = form.finished(model.get_output_embeddings()(form.norm(x)))
    assert torch.allclose(logits, run(model, ids)[0], atol=1e-4)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.layers[2].self_attn, "scaling", 0.5),
        lambda model: model.model.layers[1].mlp.register_forward_hook(lambda *_: None),
        lambda model: model.model.layers[1].mlp.double(),
        lambda model: setattr(model.model, "norm", nn.Identity()),
        lambda model: setattr(model.model.rotary_emb, "rope_type", "dynamic"),
    ],
    ids=["scaling", "hook", "dtype", "norm", "rope"],
)
def test_what_is_changed_is_read_or_refused(change):
    model = decoder_of("llama")
    change(model)
    try:
        form = read(model, Decoder.of(model))
    except UnknownFormError:
        return
    assert form.blocks[2].attention.scaling == 0.5


def test_a_block_that_computes_something_else_is_found():
    model = decoder_of("llama")
    layer = model.model.layers[1]
    own = layer.mlp.forward
    layer.mlp.forward = lambda x: 1.01 * own(x)
    with pytest.raises(UnknownFormError, match="block 1, LlamaDecoderLayer, computes something else than its form"):
        read(model, Decoder.of(model))


def test_a_norm_follows_its_module():
    module = decoder_of("llama").model.norm
    norm = Norm(module, 1e-6)
    with torch.no_grad():
        module.weight = nn.Parameter(torch.full_like(module.weight, 3.0))
    assert torch.equal(norm.weight, torch.full_like(module.weight, 3.0))


def test_a_model_without_a_form_decodes_by_layers_and_says_so_once(monkeypatch):
    monkeypatch.setattr(by_step, "_said", set())
    model = decoder_of("mixtral")
    plan = masks(model)
    said = "MixtralForCausalLM decodes by the kernels of single layers.*gated MLP alone"
    with pytest.warns(UserWarning, match=said), decoding(plan, model):
        assert step_of(model) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with decoding(plan, model):
            pass


def test_a_gpu_without_triton_is_refused(monkeypatch):
    class OnGpu:
        weight = type("Weight", (), {"dtype": torch.bfloat16, "device": torch.device("cuda")})

        def sites(self):
            return [None]

        def projection(self, site):
            return self

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SparsifierError, match="decoding on a GPU needs Triton, which is not installed"):
        known_form(nn.Identity(), OnGpu())
