"""Takes from a GGUF what transformers leaves out of its configuration, and refuses what nothing takes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from resting.benchmarks.assets import gguf_rope
from resting.benchmarks.assets.gguf_parts import value
from resting.benchmarks.errors import AssetError

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
"""Those whose conversion is compared with a model that was built by hand, in the tests."""
REQUIRED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
"""Keys of an architecture without which llama.cpp refuses a file; transformers would take a number of its own."""


def _head(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _named(name: str, default: Any = None) -> Callable[[Any], Any]:
    return lambda config: getattr(config, name, default)


def _always(constant: Any) -> Callable[[Any], Any]:
    return lambda config: constant


def _query_scale(config: Any) -> float:
    return float((getattr(config, "query_pre_attn_scalar", None) or _head(config)) ** -0.5)


APPLIED: dict[str, Callable[[Any], Any]] = {
    "context_length": _named("max_position_embeddings"),
    "embedding_length": _named("hidden_size"),
    "block_count": _named("num_hidden_layers"),
    "feed_forward_length": _named("intermediate_size"),
    "vocab_size": _named("vocab_size"),
    "attention.head_count": _named("num_attention_heads"),
    "attention.head_count_kv": _named("num_key_value_heads"),
    "attention.key_length": _head,
    "attention.value_length": _head,
    "attention.layer_norm_rms_epsilon": _named("rms_norm_eps"),
    "attention.sliding_window": _named("sliding_window"),
    "attention.causal": _always(True),
    "attention.scale": _query_scale,
    "attn_logit_softcapping": _named("attn_logit_softcapping"),
    "final_logit_softcapping": _named("final_logit_softcapping"),
    "expert_count": _always(0),
    "expert_used_count": _always(0),
    "logit_scale": _always(1.0),
    "residual_scale": _always(1.0),
    "tensor_data_layout": _always("Meta AI original pth"),
    "rope.dimension_count": _head,
    "rope.freq_base": gguf_rope.base,
    "rope.freq_base_swa": gguf_rope.local_base,
}
"""What the model computes with, by the key that asks for it; every other key of an architecture is refused."""


def complete(config: Any, reader: Any) -> None:
    """Set in `config` what transformers does not read from the file, as llama.cpp understands it.

    Raises
    ------
    AssetError
        If the file asks for something that the model cannot be given.
    """
    architecture = value(reader, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise AssetError(f"its architecture is {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    kind = value(reader, "general.type", "model")
    if kind != "model":
        raise AssetError(f"it holds what it calls {kind!r}; allowed: a model")
    for key in REQUIRED:
        if f"{architecture}.{key}" not in reader.fields:
            raise AssetError(f"it lacks the setting {architecture}.{key}")
    head = value(reader, f"{architecture}.attention.key_length")
    config.head_dim = int(head or config.hidden_size // config.num_attention_heads)
    if architecture in ("gemma2", "gemma3"):
        if f"{architecture}.attention.sliding_window" not in reader.fields:
            raise AssetError(f"it lacks the setting {architecture}.attention.sliding_window")
        # As in llama.cpp: the file does not say it, and the 27B models have another one.
        largest = {"gemma2": 46, "gemma3": 62}[architecture]
        wide = config.num_hidden_layers == largest
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if wide else config.head_dim
    gguf_rope.complete(config, reader, architecture)


def check_settings(config: Any, reader: Any) -> None:
    """Refuse a setting of the architecture that the model does not compute with.

    Raises
    ------
    AssetError
        Names the setting, its value and the one that is applied.
    """
    architecture = value(reader, "general.architecture")
    for name in reader.fields:
        key = name.removeprefix(f"{architecture}.")
        if key == name or key in gguf_rope.KEYS:
            continue
        found = value(reader, name)
        if key not in APPLIED:
            raise AssetError(f"it has the setting {name} = {found!r}, which cannot be applied")
        applied = APPLIED[key](config)
        if not _alike(found, applied):
            raise AssetError(f"it has the setting {name} = {found!r}; the model would be given {applied!r}")


def _alike(found: Any, applied: Any) -> bool:
    if isinstance(found, str | bool | list) or isinstance(applied, str | bool | list) or applied is None:
        return bool(found == applied)
    return math.isclose(found, applied, rel_tol=1e-6)


def check_tensors(model: torch.nn.Module, reader: Any) -> None:
    """Refuse a file that does not hold exactly the tensors of `model`, in their shapes.

    Raises
    ------
    AssetError
        Names the first tensor that is missing, or that nothing takes.
    """
    import gguf

    config: Any = model.config
    architecture = value(reader, "general.architecture")
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(number, config.num_hidden_layers)
    asked = {}
    for name, parameter in model.state_dict().items():
        base, _, kind = name.rpartition(".")
        if not (name == "lm_head.weight" and config.tie_word_embeddings):
            asked[f"{names.get_name(base)}.{kind}"] = tuple(parameter.shape)
    found = {tensor.name: tuple(reversed([int(n) for n in tensor.shape])) for tensor in reader.tensors}
    found.pop(gguf_rope.FACTORS, None)
    for name in asked:
        if name not in found:
            raise AssetError(f"it lacks the tensor {name}")
    for name, shape in found.items():
        if name not in asked:
            raise AssetError(f"it has the tensor {name}, which a {architecture} model does not take")
        if shape != asked[name]:
            raise AssetError(f"its tensor {name} has the shape {list(shape)}; allowed: {list(asked[name])}")


def check_tokenizer(tokenizer: Any, reader: Any) -> None:
    """Refuse a tokenizer that begins or ends a text in another way than the file says.

    Raises
    ------
    AssetError
        Older versions of transformers leave the BOS token of a Gemma out, for instance, without which it is no model.
    """
    ids = tokenizer("a").input_ids
    for name, place in (("bos", slice(0, 1)), ("eos", slice(-1, None))):
        wanted, token = (value(reader, f"tokenizer.ggml.{key}") for key in (f"add_{name}_token", f"{name}_token_id"))
        if wanted is not None and token is not None and bool(wanted) != (ids[place] == [int(token)]):
            does = "adds none" if wanted else "adds one"
            raise AssetError(
                f"tokenizer.ggml.add_{name}_token is {bool(wanted)}, and the tokenizer that transformers makes of it "
                f"{does}; allowed: one that follows the file, as a newer version of transformers may"
            )
