"""Small GGUF files as llama.cpp's converter writes them, and what they compute, from their own tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from families import SMALL, build
from transformers import AutoModelForCausalLM, LlamaConfig

HEAD = SMALL["hidden_size"] // SMALL["num_attention_heads"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
GEMMA = {"post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm"}
GEMMA |= {"post_feedforward_layernorm": "post_ffw_norm"}
OUTSIDE = ("GGUF.", "general.", "tokenizer.")
"""Beginnings of keys that are of no architecture."""
UNDERSTOOD = {"attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length"}
UNDERSTOOD |= {"attention.layer_norm_rms_epsilon", "rope.freq_base", "rope.dimension_count"}
UNDERSTOOD |= {"rope.scaling.type", "rope.scaling.factor"}
UNDERSTOOD_PLAIN = {"context_length", "embedding_length", "block_count", "feed_forward_length", "vocab_size"}
"""Keys of an architecture that `expected` computes with; those without a dot are the second set."""
IDS = torch.arange(3, 43).view(1, -1)
"""A text of 40 tokens."""


def name_of(name: str, family: str) -> str:
    """What llama.cpp calls a tensor that transformers calls `name`."""
    base, _, kind = name.rpartition(".")
    known = NAMES | (GEMMA if family.startswith("gemma") else {})
    if base.startswith("model.layers."):
        number, _, part = base.removeprefix("model.layers.").partition(".")
        return f"blk.{number}.{known[part]}.{kind}"
    return f"{known[base]}.{kind}"


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """How a llama's q and k are stored: the two halves of a head's rotation beside each other."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    rows = weight.shape[0] // heads
    return weight.reshape(heads, rows // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)


def tensors_of(family: str, model: torch.nn.Module | None = None) -> dict[str, np.ndarray]:
    """The tensors of a random model, as a file holds them."""
    found = {}
    model = model or build(family)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        array = weight.numpy().copy()
        if family in ("llama", "mistral") and ("q_proj" in name or "k_proj" in name):
            array = permuted(array, SMALL["num_attention_heads" if "q_proj" in name else "num_key_value_heads"])
        if family.startswith("gemma") and "norm" in name:
            array = array + 1
        found[name_of(name, family)] = array
    return found


def settings_of(architecture: str) -> dict[str, Any]:
    """The metadata of a small model."""
    found = {
        "context_length": SMALL["max_position_embeddings"],
        "embedding_length": SMALL["hidden_size"],
        "block_count": SMALL["num_hidden_layers"],
        "feed_forward_length": SMALL["intermediate_size"],
        "attention.head_count": SMALL["num_attention_heads"],
        "attention.head_count_kv": SMALL["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "rope.freq_base": 10000.0,
    }
    return {f"{architecture}.{key}": value for key, value in found.items()}


def _tokens() -> list[str]:
    letters = [chr(n) for n in range(33, 127)]
    return ["<unk>", "<s>", "</s>", *letters[:-1], "ab"]


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
    architecture: str = "llama",
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """Write a file of these tensors, each in its kind (F32 where none is given)."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type("model")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(_tokens())
    writer.add_token_types([3, 3, 3] + [1] * (SMALL["vocab_size"] - 3))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    put(writer, settings)
    put(writer, more or {})
    for name, array in tensors.items():
        kind = (kinds or {}).get(name, gguf.GGMLQuantizationType.F32)
        raw = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), kind)
        writer.add_tensor(name, raw, raw_dtype=kind)
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()
    return path


def put(writer: gguf.GGUFWriter, settings: Mapping[str, Any]) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in settings.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds[type(value)](key, value)


def in_parts(path: Path, count: int) -> list[Path]:
    """The file in `count` parts as gguf-split writes them; its own is gone."""
    reader = gguf.GGUFReader(path)
    parts = [path.with_name(f"{path.stem}-{n + 1:05d}-of-{count:05d}.gguf") for n in range(count)]
    for number, part in enumerate(parts):
        writer = gguf.GGUFWriter(part, "llama")
        for field in reader.fields.values() if number == 0 else ():
            if not field.name.startswith("GGUF.") and field.name != "general.architecture":
                element = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
                writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=element)
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in reader.tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            step()
        writer.close()
    path.unlink()
    return parts


def expected(path: Path) -> torch.Tensor:
    """The logits of a llama that is built by hand, from the file's numbers alone."""
    reader = gguf.GGUFReader(path)
    get = {key.removeprefix("llama."): field.contents() for key, field in reader.fields.items()}
    arrays = {t.name: np.array(gguf.dequantize(t.data, t.tensor_type), np.float32) for t in reader.tensors}
    unknown = {key for key in get if "." in key and not key.startswith(OUTSIDE)} - UNDERSTOOD
    assert not unknown, f"nothing is known of {unknown}"
    heads = get["attention.head_count"]
    head = get.get("attention.key_length", get["embedding_length"] // heads)
    assert {get.get("attention.value_length", head), get.get("rope.dimension_count", head)} == {head}
    config = LlamaConfig(
        vocab_size=len(arrays["token_embd.weight"]),
        hidden_size=get["embedding_length"],
        intermediate_size=get["feed_forward_length"],
        num_hidden_layers=get["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=get.get("attention.head_count_kv", heads),
        head_dim=head,
        max_position_embeddings=get["context_length"],
        rms_norm_eps=get["attention.layer_norm_rms_epsilon"],
        tie_word_embeddings="output.weight" not in arrays,
        rope_parameters={"rope_type": "default", "rope_theta": get.get("rope.freq_base", 10000.0)},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    state = {}
    for name in model.state_dict():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = arrays.pop(name_of(name, "llama"))
        if "q_proj" in name:
            array = unpermuted(array, heads)
        elif "k_proj" in name:
            array = unpermuted(array, config.num_key_value_heads)
        state[name] = torch.from_numpy(array)
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    inverse = model.model.rotary_emb.inv_freq
    kind, scale = get.get("rope.scaling.type", "linear"), get.get("rope.scaling.factor", 0.0) or 1.0
    assert kind in ("linear", "none") or scale == 1
    if kind == "linear":
        inverse = inverse / scale
    if "rope_freqs.weight" in arrays:
        inverse = inverse / torch.from_numpy(arrays.pop("rope_freqs.weight"))
    model.model.rotary_emb.inv_freq = inverse
    assert get.pop("expert_count", 0) == 0
    assert get.pop("logit_scale", 1.0) == 1.0
    plain = {key for key in get if "." not in key and key not in UNDERSTOOD_PLAIN}
    assert not plain | set(arrays), f"nothing is known of {plain | set(arrays)}"
    return logits(model)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(IDS).logits
