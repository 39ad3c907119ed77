"""Lists keys of published configurations that transformers does not read, with the value that it computes anyway."""

from __future__ import annotations

from typing import Any

SAME = {
    "experts_per_token": "num_experts_per_tok",
    "norm_eps": "layer_norm_eps",
    "rope_pct": "partial_rotary_factor",
    "rope_percent": "partial_rotary_factor",
    "block_norm_eps": "norm_eps",
    "num_heads": "num_attention_heads",
    "rms_norm_eps": "layer_norm_epsilon",
}
"""Keys that stand beside another one, which is applied, and that must have its value."""
PUBLISHED: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"moe_layer_freq": 1},
    "deepseek_v3": {"moe_layer_freq": 1},
    "phi3": {"full_attn_mod": 1},
    "gptj": {"scale_attn_weights": True},
    "starcoder2": {"activation_function": "gelu", "mlp_type": "default", "norm_type": "layer_norm"},
    "bloom": {
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "offset_alibi": 100,
        "skip_bias_add": True,
    },
    "cohere2": {
        "layer_switch": 4,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rotary_pct": 1.0,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
    },
    "falcon_h1": {"mamba_use_mlp": True, "mlp_expansion_factor": 8},
    "gemma3n_text": {"query_pre_attn_scalar": 256},
}
"""By kind of model."""


def is_published(key: str, found: Any, config: Any) -> bool:
    """Whether a key has the value that the model computes without it."""
    rope = getattr(config, "rope_parameters", None) or {}
    applied = getattr(config, SAME.get(key, ""), rope.get(SAME.get(key)))
    if applied is not None and applied == found:
        return True
    return PUBLISHED.get(config.model_type, {}).get(key, ...) == found
