"""Forms of blocks: read off every family that has one, verified, and refused with a reason."""

from __future__ import annotations

import warnings

import pytest
import torch
from decoders import FAMILIES, WITH_FORM, decoder_of, masks, run
from torch import nn

from resting.sparsifier import Decoder, SparsifierError
from resting.sparsifier.decoding import decoding
from resting.sparsifier.decoding.step import by_step, plain
from resting.sparsifier.decoding.step.by_step import known_form, step_of
from resting.sparsifier.decoding.step.form import ACTIVATIONS, Norm
from resting.sparsifier.decoding.step.reading import read, roles_of
from resting.sparsifier.decoding.step.running import UnknownFormError

REASONS = {
    "ministral3": "does not compute what its form says",  # its queries are scaled by their position
    "cohere": "does not compute what its form says",  # attention and MLP side by side
    "glm": "does not compute what its form says",  # another rotary embedding
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
@pytest.mark.parametrize("family", WITH_FORM)
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
    for family in FAMILIES.keys() - set(WITH_FORM) - set(REASONS):
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


def another(module, forward):
    """Gives `module` a class of its own whose forward is another."""
    module.__class__ = type("Another", (type(module),), {"forward": forward})


def test_a_block_that_computes_something_else_is_found():
    model = decoder_of("llama")
    own = type(model.model.layers[1].mlp).forward
    another(model.model.layers[1].mlp, lambda self, x: 1.01 * own(self, x))
    with pytest.raises(UnknownFormError, match="block 1, LlamaDecoderLayer, does not compute what its form says"):
        read(model, Decoder.of(model))


def test_a_forward_of_its_own_is_found():
    model = decoder_of("llama")
    mlp = model.model.layers[1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(x)
    with pytest.raises(UnknownFormError, match=r"model.layers.1.mlp has a hook or a forward of its own"):
        read(model, Decoder.of(model))


def test_a_trunk_that_does_something_between_its_blocks_is_found():
    model = decoder_of("llama")
    layers = model.model.layers
    own = type(layers[1]).forward
    another(layers[1], lambda self, x, *args, **kwargs: own(self, 1.3 * x, *args, **kwargs))
    with pytest.raises(UnknownFormError, match="block 1, Another, does not compute what its form says"):
        read(model, Decoder.of(model))

    class Looped(torch.nn.ModuleList):
        """Its first block is called twice, as in models that loop."""

        def __iter__(self):
            return iter([self[0], *super().__iter__()])

        def __getitem__(self, at):
            return self if isinstance(at, slice) else super().__getitem__(at)

    model = decoder_of("llama")
    decoder = Decoder.of(model)
    model.model.layers = Looped(model.model.layers)
    with pytest.raises(UnknownFormError, match="a forward calls 4 blocks, and there are 3"):
        read(model, decoder)


def test_attention_of_another_kind_is_found():
    model = decoder_of("llama")
    model.config._attn_implementation = "mine"
    with pytest.raises(UnknownFormError, match="its attention is computed by 'mine', not by eager, flash"):
        read(model, Decoder.of(model))


def test_a_window_that_only_the_config_has_is_found():
    """A Llama that was made of a Mistral: the cache drops tokens, and the model's masks hide none."""
    model = decoder_of("llama")
    model.config.sliding_window = 6
    with pytest.raises(UnknownFormError, match="the cache has a window for block 0, and the model's mask has none"):
        read(model, Decoder.of(model))


def test_asking_for_hidden_states_leaves_a_form():
    model = decoder_of("llama")
    model(torch.arange(3, 9)[None], output_hidden_states=True)  # transformers leaves its hooks
    assert read(model, Decoder.of(model))


def test_a_compiled_model_and_another_output_layer_are_found():
    model = decoder_of("llama")
    model.compile()
    with pytest.raises(UnknownFormError, match="it is compiled as a whole"):
        read(model, Decoder.of(model))
    model = decoder_of("llama")
    own = type(model.lm_head).forward
    another(model.lm_head, lambda self, x: own(self, x))
    with pytest.raises(UnknownFormError, match="no plain linear output layer"):
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
