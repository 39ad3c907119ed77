"""Every file and key of a model folder is applied as transformers applies it, or named in a refusal."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import pytest
import torch
from families import SMALL, build
from gguf_files import logits
from model_folders import UP, change, configure, loaded
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from resting.benchmarks.assets import config_keys, model_checks, models
from resting.benchmarks.errors import ModelError


def test_a_folder_is_known_by_the_hashes_of_its_files_in_order(folder):
    for number in range(40):  # more than there are cores, the first ones the largest
        (folder / f"{number:02}.txt").write_bytes(bytes([number]) * (100_000 // (number + 1)))
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".txt"))
    named = "".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)
    assert models.resolve(str(folder)).sha256 == hashlib.sha256(named.encode()).hexdigest()


@pytest.mark.parametrize("name", ["weight_scale", "weight_scale_inv", "input_scale", "bias", "lora_A.weight"])
def test_weights_that_the_model_does_not_take_are_named(folder, name):
    key = UP.removesuffix("weight") + name
    change(folder, lambda tensors: tensors.update({key: torch.full((48,), 0.001)}))
    with pytest.raises(ModelError, match=f"has the weights {key}; allowed: those that its model takes"):
        loaded(folder)


def test_a_layer_too_many_is_named(folder):
    configure(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"has the weights model\.layers\.2\..* and 8 more"):
        loaded(folder)


def test_an_output_matrix_that_the_configuration_ties_is_refused(folder):
    configure(folder, tie_word_embeddings=True)
    with pytest.raises(ModelError, match=r"has an output matrix of its own, and its config\.json says that it is"):
        loaded(folder)


def test_an_output_matrix_that_equals_the_embedding_is_taken(folder):
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    untied = loaded(folder)
    configure(folder, tie_word_embeddings=True)
    torch.testing.assert_close(loaded(folder), untied)
    change(folder, lambda t: t.pop("lm_head.weight"))
    torch.testing.assert_close(loaded(folder), untied)


def test_stored_frequencies_are_those_of_the_configuration(folder):
    own = build("llama").model.rotary_emb.inv_freq
    key = "model.layers.0.self_attn.rotary_emb.inv_freq"
    plain = loaded(folder)
    change(folder, lambda tensors: tensors.update({key: own.clone()}))
    torch.testing.assert_close(loaded(folder), plain)
    change(folder, lambda tensors: tensors.update({key: own**2}))
    with pytest.raises(ModelError, match=f"stores frequencies in {key} that its config.json does not ask for"):
        loaded(folder)


ADDED = {
    "adapter_config.json": "holds an adapter",
    "adapter_model.safetensors": "holds an adapter",
    "model-00001-of-00002.safetensors": "beside model.safetensors; allowed: one set of weights",
    "other.safetensors": "beside model.safetensors; allowed: one set of weights",
}


@pytest.mark.parametrize("name", ADDED)
def test_a_file_that_would_not_be_read_is_named(folder, name):
    if name.endswith(".json"):
        (folder / name).write_text("{}")
    else:
        save_file({UP: torch.zeros(48, 32)}, folder / name, {"format": "pt"})
    with pytest.raises(ModelError, match=ADDED[name]) as caught:
        models.resolve(str(folder))
    assert name in str(caught.value)


def test_weights_of_other_formats_are_said_to_be_unread(folder):
    plain = loaded(folder)
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "consolidated.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    said = []
    torch.testing.assert_close(loaded(folder, say=said.append), plain)
    assert said == ["pytorch_model.bin in model is not read: weights come from safetensors files"]


def sharded(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = dict(list(tensors.items())[::2]), dict(list(tensors.items())[1::2])
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    for name, half in zip(names, halves):
        save_file(half, folder / name, {"format": "pt"})
    weight_map = {key: name for name, half in zip(names, halves) for key in half}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_shards_are_read_as_one_and_a_tensor_stands_in_one_of_them(folder):
    plain = loaded(folder)
    sharded(folder)
    torch.testing.assert_close(loaded(folder), plain)
    second = folder / "model-00002-of-00002.safetensors"
    save_file(load_file(second) | load_file(folder / "model-00001-of-00002.safetensors"), second, {"format": "pt"})
    with pytest.raises(ModelError, match=r"twice, in model-00001-of-00002\.safetensors and in model-00002"):
        loaded(folder)


def test_a_shard_that_the_index_leaves_out_is_named(folder):
    sharded(folder)
    index = folder / "model.safetensors.index.json"
    known = json.loads(index.read_text())
    known["weight_map"] = {key: name for key, name in known["weight_map"].items() if "00001" in name}
    index.write_text(json.dumps(known))
    with pytest.raises(ModelError, match=r"holds model-00002-of-00002\.safetensors beside model-00001"):
        models.resolve(str(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 30.0),
        ("final_logit_softcapping", 1.0),
        ("sliding_window", 8),
        ("use_qk_norm", True),
        ("logits_scaling", 4.0),
        ("embedding_multiplier", 12.0),
        ("partial_rotary_factor", 0.5),
        ("layer_types", ["sliding_attention"] * 3),
        ("transformers_weights", "other.safetensors"),
        ("rope_parameters", {"rope_type": "weird", "rope_theta": 1e4}),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}),
        ("rope_scaling", {"type": "linear", "factor": 2.0, "low_freq_factor": 1.0}),
    ],
)
def test_a_key_that_the_model_does_not_compute_is_named(folder, key, value):
    configure(folder, **{key: value})
    with pytest.raises(ModelError) as caught:
        models.resolve(str(folder))
    assert {"rope_parameters": "rotary embedding", "rope_scaling": "low_freq_factor"}.get(key, key) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_interleaved", False),
        ("is_llama_config", True),
        ("unsloth_fixed", True),
        ("logits_scaling", 1.0),
        ("attn_logit_softcapping", None),
        ("temperature", 0.7),
        ("made_by", "someone"),
        ("rope_scaling", {"type": "linear", "factor": 2.0}),
        ("rms_norm_eps", 1e-2),
    ],
)
def test_a_key_that_changes_nothing_or_is_applied_is_taken(folder, key, value):
    configure(folder, **{key: value})
    right = logits(AutoModelForCausalLM.from_pretrained(folder))
    torch.testing.assert_close(loaded(folder), right)


HUB = {
    "meta-llama/Llama-3.2-1B": {
        "model_type": "llama",
        "head_dim": 64,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "attention_bias": False,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    },
    "HuggingFaceTB/SmolLM2-135M": {
        "model_type": "llama",
        "is_llama_config": True,
        "rope_interleaved": False,
        "rope_scaling": None,
        "rope_theta": 100000,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    },
    "Qwen/Qwen2.5-0.5B": {
        "model_type": "qwen2",
        "use_mrope": False,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "max_window_layers": 24,
        "rope_theta": 1000000.0,
        "hidden_act": "silu",
    },
    "Qwen/Qwen2.5 with YaRN": {
        "model_type": "qwen2",
        "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    },
    "Qwen/Qwen3-0.6B": {
        "model_type": "qwen3",
        "head_dim": 128,
        "max_window_layers": 28,
        "rope_scaling": None,
        "sliding_window": None,
        "use_sliding_window": False,
        "rope_theta": 1000000,
    },
    "mistralai/Mistral-7B-v0.3": {"model_type": "mistral", "sliding_window": None, "rope_theta": 1000000.0},
    "google/gemma-3-1b-pt": {
        "model_type": "gemma3_text",
        "attn_logit_softcapping": None,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": None,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "rope_local_base_freq": 10000,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": 512,
        "sliding_window_pattern": 6,
    },
    "google/gemma-2-2b": {
        "model_type": "gemma2",
        "attn_logit_softcapping": 50.0,
        "cache_implementation": "hybrid",
        "final_logit_softcapping": 30.0,
        "hidden_act": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
    },
    "allenai/OLMo-2-0425-1B": {"model_type": "olmo2", "rope_scaling": None, "rope_theta": 500000},
    "HuggingFaceTB/SmolLM3-3B": {
        "model_type": "smollm3",
        "no_rope_layers": [1, 1, 1, 0],
        "no_rope_layer_interval": 4,
        "mlp_bias": False,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "sliding_window": None,
        "rope_theta": 5000000.0,
    },
    "microsoft/Phi-3-mini-4k": {
        "model_type": "phi3",
        "attention_dropout": 0.0,
        "embd_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "rope_scaling": None,
        "original_max_position_embeddings": 4096,
        "sliding_window": 2047,
    },
}


@pytest.mark.parametrize("name", HUB)
def test_configurations_of_the_hub_are_taken(tmp_path, name):
    """Keys as they stand there, with the oddities that real files have; sizes are small."""
    raw = {**SMALL, "transformers_version": "4.45.0", "_name_or_path": "x", "use_cache": True} | HUB[name]
    raw |= {"initializer_range": 0.02, "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2}
    if "no_rope_layers" in raw:
        raw |= {"num_hidden_layers": 4}
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config_keys.check(raw, AutoConfig.from_pretrained(tmp_path), tmp_path)


def test_the_package_for_a_tokenizer_model_is_named(folder, monkeypatch):
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x05")
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    said = r"has its tokenizer in tokenizer\.model alone, which sentencepiece reads: install it \(pip install sentencep"
    with pytest.raises(ModelError, match=said):
        models.resolve(str(folder)).tokenizer()


def test_no_package_is_named_where_there_is_a_tokenizer_json(folder):
    (folder / "tokenizer.model").write_bytes(b"")
    assert model_checks.lacking_package(folder) is None
