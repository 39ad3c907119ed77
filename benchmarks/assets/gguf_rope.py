"""Reads the rotary embedding that a GGUF asks for; transformers reads its base only."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from resting.benchmarks.assets.gguf_parts import value
from resting.benchmarks.errors import AssetError

FACTORS = "rope_freqs.weight"
"""The tensor that divides each frequency: how Llama 3.1 and later are written."""
KEYS = frozenset(
    {"rope.scale_linear"}
    | {f"rope.scaling.{key}" for key in ("type", "factor", "original_context_length", "finetuned", "attn_factor")}
)
"""Keys of an architecture that `complete` applies, or refuses."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3_CONTEXT, LLAMA3_FACTORS = 8192, (8.0, 32.0)


def base(config: Any) -> float:
    """Return the base of the frequencies that the model computes with."""
    rope = _full(config)
    return float(rope["rope_theta"])


def local_base(config: Any) -> float | None:
    """Return the base of the layers with a sliding window."""
    local = config.rope_parameters.get("sliding_attention")
    return None if local is None else float(local["rope_theta"])


def _full(config: Any) -> dict[str, Any]:
    """The parameters of the layers without a window; a family with one kind of layer has one set."""
    rope: dict[str, Any] = config.rope_parameters
    return rope.get("full_attention", rope)


def complete(config: Any, reader: Any, architecture: str) -> None:
    """Give `config` the base and the scaling that the file asks for.

    Raises
    ------
    AssetError
        If transformers has no such scaling.
    """
    rope = _full(config)
    rope["rope_theta"] = float(value(reader, f"{architecture}.rope.freq_base", 10000.0))
    scaling = _scaling(reader, architecture)
    factors = next((tensor for tensor in reader.tensors if tensor.name == FACTORS), None)
    if factors is not None:
        original = value(reader, _key(architecture, "original_context_length"))
        found = _llama3(factors, rope["rope_theta"], config, original)
        if found and scaling:
            raise AssetError(f"it has both {FACTORS} and {_key(architecture, 'factor')}; allowed: one of them")
        scaling = scaling or found
    rope.update(scaling)


def _key(architecture: str, name: str) -> str:
    return f"{architecture}.rope.scaling.{name}"


def _scaling(reader: Any, architecture: str) -> dict[str, Any]:
    """What the metadata say. As in llama.cpp: a factor without a type is a linear one, and 0 is none."""
    if value(reader, _key(architecture, "attn_factor"), 1.0) not in (0.0, 1.0):
        raise AssetError(f"it has the setting {_key(architecture, 'attn_factor')}, which cannot be applied")
    old = value(reader, f"{architecture}.rope.scale_linear", 0.0)
    factor = float(value(reader, _key(architecture, "factor"), old))
    kind = value(reader, _key(architecture, "type"), "linear")
    if kind not in ("none", "linear", "yarn"):
        raise AssetError(f"it has the setting {_key(architecture, 'type')} = {kind!r}; allowed: none, linear, yarn")
    if kind == "none" or factor in (0.0, 1.0):
        return {}
    if not math.isfinite(factor) or factor < 1:
        raise AssetError(f"it has the setting {_key(architecture, 'factor')} = {factor}; allowed: 1 or more")
    found: dict[str, Any] = {"rope_type": kind, "factor": factor}
    original = value(reader, _key(architecture, "original_context_length"))
    if kind == "yarn":
        if not original:
            raise AssetError(f"it lacks the setting {_key(architecture, 'original_context_length')}")
        found["original_max_position_embeddings"] = int(original)
    return found


def _llama3(tensor: Any, theta: float, config: Any, original: int | None) -> dict[str, Any]:
    """The scaling of Llama 3 that the factors in the file are made by; nothing where all are 1."""
    import gguf

    factors = np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float64).reshape(-1)
    if len(factors) != config.head_dim // 2:
        raise AssetError(f"its tensor {FACTORS} has {len(factors)} numbers; allowed: {config.head_dim // 2}")
    if np.array_equal(factors, np.ones_like(factors)):
        return {}
    for factor in (float(np.max(factors)), *LLAMA3_FACTORS):
        context = int(original or LLAMA3_CONTEXT)
        found = LLAMA3 | {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": context}
        if np.allclose(factors, _factors(found, theta, config.head_dim), rtol=1e-4, atol=0):
            return found
    raise AssetError(f"its tensor {FACTORS} is of no known scaling; allowed: that of Llama 3.1 to 3.3")


def _factors(rope: dict[str, Any], theta: float, head: int) -> np.ndarray:
    """By how much Llama 3's scaling divides each frequency."""
    waves = 2 * math.pi * theta ** (np.arange(0, head, 2) / head)
    turns = rope["original_max_position_embeddings"] / waves
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return np.asarray(1 / ((1 - smooth) / factor + smooth))
