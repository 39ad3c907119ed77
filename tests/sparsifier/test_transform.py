"""A rewritten model computes the same, in both forms, and comes back bit for bit; what cannot take it is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from families import SMALL
from rewriting import build, exact, q, transforms
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)

from resting.sparsifier import (
    AllButFirst,
    Decoder,
    Meter,
    Plan,
    PlanError,
    Rule,
    Site,
    Transform,
    UnsupportedModelError,
    fingerprint,
)
from resting.sparsifier.transform import active, explicit, merged

KINDS = list(transforms())


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.mark.parametrize("form", [explicit, merged])
@pytest.mark.parametrize("kind", KINDS)
def test_both_forms_equal_the_dense_model_in_fp64(kind, form, ids):
    model = exact(build())
    dense = logits(model, ids)
    with form(transforms()[kind], model):
        found = logits(model, ids)
    assert not torch.equal(found, dense)  # it is rewritten
    assert float((found - dense).abs().max()) < 1e-12


def look_and_stop(form, transform, model, digest, state):
    """Inside, what is seen of the model's state is that of the dense one, and it takes no other."""
    with form(transform, model):
        assert fingerprint.of_model(model) == digest
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        with pytest.raises(PlanError, match="leave its `with` block before weights are loaded"):
            model.load_state_dict(state)
        raise RuntimeError("stop")


def refuse(transform, model, error, message):
    with pytest.raises(error, match=message), explicit(transform, model):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_comes_back_bit_for_bit_after_an_exception(kind, model):
    before = [(name, id(p), p.data_ptr(), p.clone()) for name, p in model.named_parameters(remove_duplicate=False)]
    digest, state = fingerprint.of_model(model), {k: v.clone() for k, v in model.state_dict().items()}
    for form in (explicit, merged):
        with pytest.raises(RuntimeError, match="stop"):
            look_and_stop(form, transforms()[kind], model, digest, state)
        now = [(name, id(p), p.data_ptr(), p) for name, p in model.named_parameters(remove_duplicate=False)]
        assert [entry[:3] for entry in now] == [entry[:3] for entry in before]
        assert all(torch.equal(a[3], b[3]) for a, b in zip(now, before))
        assert not any(m._forward_hooks or m._state_dict_hooks for m in model.modules())
        assert active(model) is None
        assert fingerprint.of_model(model) == digest


def test_sites_read_what_the_formula_says(model, ids):
    """At q and gate n Q, with n the normed residual without the norm's weight; at o every head turned by its R."""
    transform = transforms()["both"]
    seen: dict[str, torch.Tensor] = {}

    def keep(name):
        return lambda module, args: seen.__setitem__(name, args[0])

    layer = model.model.layers[1]
    handles = [layer.register_forward_pre_hook(keep("r"))]
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj"):
        handles.append(layer.get_submodule(name).register_forward_pre_hook(keep(name)))
    logits(model, ids)
    plain = dict(seen)
    with explicit(transform, model):
        logits(model, ids)
    for handle in handles:
        handle.remove()
    r = plain["r"]
    n = r / (r.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
    rotation = transform.rotations[0].float()
    assert torch.allclose(seen["self_attn.q_proj"], n @ rotation, atol=1e-5)
    m = plain["mlp.gate_proj"] / layer.post_attention_layernorm.weight
    assert torch.allclose(seen["mlp.gate_proj"], m @ rotation, atol=1e-4)
    turned = [plain["self_attn.o_proj"][..., 8 * h : 8 * h + 8] @ transform.heads[1][h // 2].float() for h in range(4)]
    assert torch.allclose(seen["self_attn.o_proj"], torch.cat(turned, -1), atol=1e-5)


def test_the_identity_is_topk_teal_bit_for_bit(ids):
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    rules = {site: Rule(topk=12) for site in Decoder.of(model).sites()}
    plan = Plan(rules, "teal-topk", 0.5, 0.5, fingerprint.of_model(model))
    identity = Transform("identity", True, (torch.eye(32),), (0,) * 3, (0,) * 3)
    with plan.applied(model):
        wanted = logits(model, ids)
    with replace(plan, transform=identity).applied(model):
        assert torch.equal(logits(model, ids), wanted)


@pytest.mark.parametrize(
    ("shape", "share"),
    [
        ((576, 1536, 9, 3, 64), 0.0938),  # SmolLM2-135M
        ((4096, 11008, 32, 32, 128), 0.0829),  # Llama-2-7B
        ((4096, 14336, 32, 8, 128), 0.0769),  # Llama-3-8B
        ((3584, 18944, 28, 4, 128), 0.0551),  # Qwen2.5-7B
    ],
)
def test_the_bytes_of_adapters(shape, share):
    hidden = shape[0]
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    config = LlamaConfig(**dict(zip(names, shape)), num_hidden_layers=5, vocab_size=8)
    with torch.device("meta"):
        decoder = Decoder.of(AutoModelForCausalLM.from_config(config))
    block = decoder.elements / 5
    rotations, each = tuple(torch.empty(hidden, hidden, device="meta") for _ in range(10)), tuple(range(5))
    one = Transform("one a block", True, rotations[:5], each, each)
    two = Transform("two a block", True, rotations, tuple(range(0, 10, 2)), tuple(range(1, 10, 2)))
    for transform in (one, two):
        transform.check(decoder)
    # The last rotation of the last block is taken up by the output layer.
    assert one.extra_elements / block / 4 == pytest.approx(share, abs=5e-5)
    assert two.extra_elements == 9 * hidden**2
    assert replace(one, free=True).extra_elements == 0
    assert Transform("global", True, rotations[:1], (0,) * 5, (0,) * 5).extra_elements == 0


def test_adapters_count_as_read(model, ids):
    decoder, transform = Decoder.of(model), transforms()["block"]
    rules = {site: Rule(topk=8) for site in decoder.sites()}
    plan = Plan(rules, "mine", 0.5, 0.5, fingerprint.of_model(model), transform=transform)
    shares = []
    for free in (False, True):
        meter = Meter()
        with replace(plan, transform=replace(transform, free=free)).applied(model, AllButFirst(0), meter):
            logits(model, ids)
        shares.append(meter.byte_sparsity())
    assert shares[1] - shares[0] == pytest.approx(2 * 32**2 / decoder.elements)


def test_plans_keep_their_transform(model, ids, tmp_path):
    rules = {Site(1, "q"): Rule(threshold=0.5), Site(2, "o"): Rule(threshold=0.2)}
    plan = Plan(rules, "mine", 0.5, 0.5, fingerprint.of_model(model), transform=transforms()["both"])
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded.transform.meta() == plan.transform.meta()
    assert all(torch.equal(t, loaded.transform.tensors()[k]) for k, t in plan.transform.tensors().items())
    with plan.applied(model):
        wanted = logits(model, ids)
    with loaded.applied(model):
        assert torch.equal(logits(model, ids), wanted)


def test_biases_of_a_rewritten_model_fold_into_the_dense_one(ids, tmp_path):
    model = build()
    decoder, generator = Decoder.of(model), torch.Generator().manual_seed(0)
    rules = {
        site: Rule(threshold=0.2, bias=torch.randn(decoder.projection(site).out_features, generator=generator))
        for site in decoder.sites()
    }
    plan = Plan(rules, "mine", 0.5, 0.5, fingerprint.of_model(model), transform=transforms()["both"])
    with plan.applied(model, AllButFirst(0)):
        wanted = logits(model, ids)
    with plan.folded(model) as masks, masks.applied(model, AllButFirst(0)):
        assert all(rule.bias is None for rule in masks.rules.values())
        assert torch.allclose(logits(model, ids), wanted, atol=2e-5 * float(wanted.abs().max()))
    plan.export(model, tmp_path / "exported")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()
    with Plan.load(tmp_path / "exported" / "masks").applied(loaded, AllButFirst(0)):
        assert torch.allclose(logits(loaded, ids), wanted, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda meta, tensors: meta.update(attention=[0, 0, 4]), "has 1 rotations, and no number 4"),
        (lambda meta, tensors: meta.update(folded="yes"), "folded of the transform must be a bool, got 'yes'"),
        (lambda meta, tensors: meta.update(mine=1), "the transform has a key 'mine'"),
        (lambda meta, tensors: meta.update(mlp=[0, 0, 0.5]), "names its rotations by whole numbers, got 0.5"),
        (lambda meta, tensors: tensors.pop("transform/rotation.0"), "both names rotations and has none"),
        (lambda meta, tensors: tensors["transform/rotation.0"].mul_(1.01), "rotation 0 is not orthogonal"),
        (lambda meta, tensors: tensors.pop("transform/heads.0"), "a matrix 'heads.1' out of order"),
    ],
)
def test_damaged_transforms_are_refused(change, message, tmp_path):
    Plan({}, "mine", 0.5, 0.5, "0", transform=transforms()["both"]).save(tmp_path / "plan")
    file, matrices = tmp_path / "plan" / "plan.json", tmp_path / "plan" / "rules.safetensors"
    meta, tensors = json.loads(file.read_text()), load_file(matrices)
    change(meta["transform"], tensors)
    file.write_text(json.dumps(meta))
    save_file(tensors, matrices)
    with pytest.raises(PlanError, match=message):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rotations": (q(0) * 1.001,)}, r"rotation 0 is not orthogonal: Q\^T Q is 2.0e-03 off the identity"),
        ({"rotations": (torch.full((32, 32), torch.nan),)}, "rotation 0 is not orthogonal"),
        ({"rotations": (torch.zeros(32, 31),)}, r"must be \[size, size\] of floating-point numbers, got \[32, 31\]"),
        ({"rotations": (q(0),), "folded": False}, "rotates behind norms that are not folded"),
        ({"rotations": ()}, "names rotations and has none"),
        ({"mlp": (0, 0)}, "rotates 3 attentions and 2 MLPs"),
        ({"attention": (0, 0, 1)}, "has 1 rotations, and no number 1"),
        ({"heads": (torch.zeros(2, 8, 8),)}, "the rotation of heads in block 0 is not orthogonal"),
    ],
)
def test_what_is_no_transform_is_refused(arguments, message):
    with pytest.raises(PlanError, match=message):
        Transform(
            **(
                {"name": "mine", "folded": True, "rotations": (q(0),), "attention": (0,) * 3, "mlp": (0,) * 3}
                | arguments
            )
        )


def test_transforms_of_other_shapes_and_two_at_once_are_refused(model):
    refuse(transforms(2)["both"], model, PlanError, "both has rotations for 2 blocks, the model has 3")
    wide = Transform("wide", True, (q(0, 40),), (0,) * 3, (0,) * 3)
    refuse(wide, model, PlanError, r"wide rotates 40 channels, 0\.q reads 32")
    plan = Plan({}, "mine", 0.5, 0.5, fingerprint.of_model(model))
    with explicit(transforms()["both"], model):
        with pytest.raises(PlanError, match="the transform both is on this model"), plan.applied(model):
            pass
        refuse(transforms()["heads"], model, PlanError, "the transform both is on this model")


CONFIGS = {
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "gemma3": lambda: Gemma3TextConfig(**SMALL, head_dim=8),
    "phi3": lambda: Phi3Config(**SMALL),
    "olmo2": lambda: Olmo2Config(**SMALL),
    "mixtral": lambda: MixtralConfig(**SMALL, num_local_experts=4),
    "gpt2": lambda: GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64),
}
NO_NORM = "block 0 has no norm whose output its attention reads"
OF_ITS_OWN = "block 0, Gemma3DecoderLayer, does not compute the same under {}: .* each channel's own"
FUSED = "block 0 has no v of its own to rotate heads by; it has qkv, o"
REFUSED = {
    ("gemma3", "global"): OF_ITS_OWN.format("global"),
    ("gemma3", "two"): OF_ITS_OWN.format("two"),
    ("gemma3", "both"): OF_ITS_OWN.format("both"),
    ("phi3", "heads"): FUSED,
    ("phi3", "both"): FUSED,
    ("gpt2", "heads"): FUSED,
    ("mixtral", "folded"): "block 0 has experts",
    ("mixtral", "global"): "block 0 has experts",
    ("mixtral", "two"): "block 0 has experts",
    ("mixtral", "both"): "block 0 has experts",
    **{("olmo2", kind): NO_NORM for kind in ("folded", "global", "two", "both")},
    **{("gpt2", kind): "is no norm with one weight" for kind in ("folded", "global", "two", "both")},
}


@pytest.mark.parametrize("family", CONFIGS)
def test_families_compute_the_same_or_are_refused(family, ids):
    model = build(CONFIGS[family]())
    dense = logits(model, ids)
    for kind in ("folded", "global", "two", "heads", "both"):
        for form in (explicit, merged):
            message = REFUSED.get((family, kind))
            if message is None:
                with form(transforms()[kind], model):
                    assert torch.allclose(logits(model, ids), dense, atol=2e-5 * float(dense.abs().max()))
            else:
                with pytest.raises(UnsupportedModelError, match=message), form(transforms()[kind], model):
                    pass
            assert torch.equal(logits(model, ids), dense)


def test_what_stands_between_values_and_o_is_found():
    model = build()
    gate = torch.rand(32)
    model.model.layers[2].self_attn.o_proj.register_forward_pre_hook(lambda module, args: (args[0] * gate,))
    refuse(transforms()["heads"], model, UnsupportedModelError, r"block 2, .* between the values and the output matrix")


def test_what_else_reads_a_norm_is_found():
    model = build()
    layer = model.model.layers[1]
    layer.mlp.register_forward_hook(lambda module, args, output: output + 0.1 * args[0])
    refuse(transforms()["folded"], model, UnsupportedModelError, r"block 1, .* something else than its matrices reads")
