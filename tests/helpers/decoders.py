"""Tiny random decoders of all families that transformers has and people run, from their configs alone."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from families import SMALL
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from resting.sparsifier import Calibration, Decoder, Plan, Rule, Site
from resting.sparsifier.fingerprint import of_model

HEAD = {"head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
FOUR, LOCAL = {"num_experts": 4, "num_experts_per_tok": 2}, {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS}
LATENT = {"kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
QUERY_LATENT = {"q_lora_rank": 16, **LATENT}
STATE = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_expand": 2, "mamba_n_groups": 1}
SHARED_KV = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "hidden_size_per_layer_input": 8, **HEAD}
SHARED_KV |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "vocab_size_per_layer_input": 97}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
LINEAR |= {"layer_types": ["linear_attention", "linear_attention", "full_attention"], **HEAD}

IDS = torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(3))
CALIBRATION = Calibration(torch.randint(3, 97, (8, 24), generator=torch.Generator().manual_seed(2)), batch_size=8)
CLOSE = {"rtol": 1e-4, "atol": 3e-5}

FAMILIES: dict[str, dict[str, Any]] = {
    # A gate, and separate projections.
    "llama": {},
    "mistral": {},
    "ministral3": HEAD,
    "qwen2": {},
    "qwen3": HEAD,
    "gemma": HEAD,
    "gemma2": HEAD,
    "gemma3_text": HEAD,
    "vaultgemma": HEAD,
    "olmo": {},
    "olmo2": {},
    "olmo3": {},
    "smollm3": {},
    "granite": {"logits_scaling": 8.0},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, **HEAD},
    "helium": HEAD,
    "exaone4": {"sliding_window": 16},
    "seed_oss": HEAD,
    "ernie4_5": HEAD,
    "hunyuan_v1_dense": HEAD,
    "stablelm": {},
    "diffllama": {},
    "bitnet": {},
    # Fused projections.
    "phi3": {},
    "glm": HEAD,
    "glm4": HEAD,
    "gpt_neox": {},
    "falcon": {"ffn_hidden_size": 48},
    "gpt2": {"n_inner": 48},
    "gpt_bigcode": {"n_inner": 48},
    "bloom": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3, "max_seq_len": 64},
    "codegen": {"rotary_dim": 4},
    "persimmon": {},
    # No gate.
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi": {},
    "gptj": {"rotary_dim": 4, "n_inner": 48},
    "starcoder2": {},
    "nemotron": {},
    "arcee": {},
    "apertus": {},
    "nanochat": {},
    "jais2": {},
    "biogpt": {},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    # Experts.
    "mixtral": LOCAL,
    "qwen2_moe": {"shared_expert_intermediate_size": 40, **FOUR, **EXPERTS},
    "qwen3_moe": {**FOUR, **EXPERTS, **HEAD},
    "olmoe": FOUR,
    "flex_olmo": FOUR,
    "phimoe": LOCAL,
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], **LOCAL, **HEAD},
    "granitemoe": {"logits_scaling": 8.0, **LOCAL},
    "granitemoeshared": {"logits_scaling": 8.0, "shared_intermediate_size": 40, **LOCAL},
    "glm4_moe": {**ROUTED, **HEAD},
    "dots1": {"n_shared_experts": 1, **ROUTED, **HEAD},
    "hunyuan_v1_moe": {"moe_topk": 2, **FOUR, **HEAD},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24},
    "minimax_m2": {**LOCAL, **HEAD},
    "afmoe": {"num_dense_layers": 1, **FOUR, **EXPERTS, **HEAD},
    "exaone_moe": {
        "sliding_window": 16,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **FOUR,
        **EXPERTS,
        **HEAD,
    },
    "mimo_v2_flash": {"n_routed_experts": 4, "v_head_dim": 8, **EXPERTS, **HEAD},
    "deepseek_v2": {"n_shared_experts": 1, "q_lora_rank": None, **ROUTED, **LATENT, "head_dim": 4},
    "deepseek_v3": {**ROUTED, **QUERY_LATENT},
    "glm4_moe_lite": {**ROUTED, **QUERY_LATENT},
    # Latents, and blocks that differ.
    "minicpm3": {**QUERY_LATENT, "qk_head_dim": 12},
    "gemma3n_text": {
        "laurel_rank": 4,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "intermediate_size": [48] * 4,
        **SHARED_KV,
    },
    "gemma4_text": {"global_head_dim": 8, **SHARED_KV},
    # Mixers with a state beside attention.
    "qwen3_next": {"shared_expert_intermediate_size": 40, **FOUR, **EXPERTS, **LINEAR},
    "qwen3_5_text": LINEAR,
    "olmo_hybrid": {},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1, **FOUR, **EXPERTS},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_dt_rank": 2,
        "mamba_d_state": 4,
        **FOUR,
    },
    "bamba": {"attn_layer_indices": [1], **STATE},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 40,
        "logits_scaling": 8.0,
        **LOCAL,
        **STATE,
    },
    "falcon_h1": {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "lm_head_multiplier": 0.5,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 1,
        "moe_shared_expert_intermediate_size": 40,
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        **ROUTED,
        **HEAD,
    },
    "minimax": {"block_size": 4, **LOCAL, **HEAD},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, **HEAD},
    # Refused.
    "mamba": {},
    "llama4_text": {"intermediate_size_mlp": 48, **LOCAL, **HEAD},
    "jetmoe": {},
    "longcat_flash": {"n_routed_experts": 4, "zero_expert_num": 2, "moe_topk": 2, "expert_ffn_hidden_size": 24},
    "bart": {"d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "decoder_attention_heads": 4},
}

WITH_FORM = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "vaultgemma", "olmo2", "olmo3"]
WITH_FORM += ["smollm3", "granite", "exaone4", "seed_oss", "phi3"]
"""Families whose blocks have a known form."""


def config(family: str) -> Any:
    """The config of a tiny model of `family`."""
    default = AutoConfig.for_model(family)
    small = {key: value for key, value in SMALL.items() if hasattr(default, key)}
    return AutoConfig.for_model(family, **(small | FAMILIES[family]))


def decoder_of(family: str, seed: int = 0) -> torch.nn.Module:
    """A random model whose weights are large enough that its activations are not all alike; experts run eagerly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config(family)).eval()
    model.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.15)
    return model


def plan_of(model: nn.Module, rules: dict[Site, Rule]) -> Plan:
    return Plan(rules, "x", 0.3, 0.3, of_model(model))


def masks(model: nn.Module, threshold: float = 0.2) -> Plan:
    """Give a threshold to the input of every matrix, not the same everywhere, and none that an input nearly equals.

    An input that falls to the other side of its threshold by a rounding changes logits by far more than a rounding,
    and processors round differently. So thresholds are taken that may move a little without a change.
    """
    continued = torch.cat([IDS[:, :4], _tokens_after(model, masks_at(model, threshold))], 1)
    for margin, step in itertools.product(MARGINS, range(6)):
        near = (masks_at(model, threshold * (1 + step / 50) * (1 + by)) for by in (-margin, margin))
        below, above = ([_logits(model, plan, ids) for ids in (IDS, continued)] for plan in near)
        if all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(below, above)):
            return masks_at(model, threshold * (1 + step / 50))
    raise AssertionError(f"every threshold near {threshold} has an input near it")


MARGINS = (2e-5, 1e-5, 5e-6)
"""Of a threshold: some hundred roundings of float32, fewer where a model has many experts."""


def masks_at(model: nn.Module, threshold: float) -> Plan:
    sites = Decoder.of(model).sites()
    return plan_of(model, {site: Rule(threshold=threshold * (1 + i % 3 / 4)) for i, site in enumerate(sites)})


def _logits(model: nn.Module, plan: Plan, ids: torch.Tensor) -> torch.Tensor:
    with plan.applied(model):
        return run(model, ids.to(next(model.parameters()).device))


def _tokens_after(model: nn.Module, plan: Plan) -> torch.Tensor:
    ids = IDS[:, :4]
    for _ in range(3):
        ids = torch.cat([ids, _logits(model, plan, ids)[:, -1:].argmax(-1).cpu()], 1)
    return ids[:, 4:]


@torch.no_grad()
def run(model: nn.Module, ids: torch.Tensor = IDS) -> torch.Tensor:
    return model(ids).logits


@torch.no_grad()
def stepped(model: nn.Module, prompt: int = 4) -> torch.Tensor:
    """Logits of a prompt, then of one token at a time."""
    ids = IDS.to(next(model.parameters()).device)
    out = model(ids[:, :prompt], use_cache=True)
    logits = [out.logits]
    for i in range(prompt, IDS.shape[1]):
        out = model(ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits)
    return torch.cat(logits, 1)
