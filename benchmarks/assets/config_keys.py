"""Looks at every key of a model's configuration: applied, without effect, or refused by name."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

from resting.benchmarks.assets.published_keys import is_published
from resting.benchmarks.errors import ModelError

COMPUTES = re.compile(
    r"soft_?cap|scal(e|ing)|multiplier|window|rope|rotary|yarn|alibi|norm|(^|_)eps(ilon)?($|_)|bias|qk_|expert|router"
    r"|moe|clip|(^|_)act(ivation)?($|_)|gate|parallel|position|logit|head|layer|attention|attn|mlp|residual|embedding"
    r"|hidden|temperature_tuning|weights|sparsity"
)
"""Names that a key has which changes what a model computes."""
HARMLESS = frozenset(
    {
        *("_name_or_path", "_attn_implementation", "_flash_attn_2_enabled", "architectures", "auto_map", "torch_dtype"),
        *("transformers_version", "quantization_config", "transformers.js_config", "is_llama_config", "unsloth_fixed"),
        *("unsloth_version", "use_cache", "gradient_checkpointing", "max_sequence_length", "model_max_length"),
        *("pretraining_tp", "tokenizer_class", "sequence_parallel", "vision_config", "audio_config", "base_model_name"),
        *("initializer_range", "embedding_initializer_range", "attn_implementation", "cache_implementation"),
        *("max_window_layers", "num_logits_to_keep"),
        *("attention_dropout", "hidden_dropout", "resid_dropout", "embd_dropout", "attn_dropout", "classifier_dropout"),
        *("attention_probs_dropout_prob", "hidden_dropout_prob", "router_aux_loss_coef", "output_router_logits"),
        *("parallelization_style", "tensor_parallel_size", "pipeline_parallel_size", "num_nextn_predict_layers"),
    }
)
"""Keys that many checkpoints have, and that change nothing in a forward pass of an evaluation."""
ROPE = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "yarn": frozenset({"factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}),
    "longrope": frozenset({"factor", "attention_factor", "short_factor", "long_factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor"}),
    "proportional": frozenset({"factor", "partial_rotary_factor"}),
}
"""What transformers reads of each scaling of the rotary embedding, beside its base and its context."""
ROPE_ANY = frozenset[str]().union(*ROPE.values()) - {"partial_rotary_factor"}  # a family may read that one itself
ROPE_ALWAYS = frozenset({"rope_type", "type", "rope_theta", "original_max_position_embeddings"})
REPLACED = {"hidden_act": "hidden_activation"}
"""Keys that stand in old configurations beside the one that is applied."""
ELSEWHERE = frozenset({"rope_scaling", "rope_theta", "rope_parameters", "dtype", "tie_word_embeddings"})
"""Read by transformers for every model, in no module of the model's own."""


def check(raw: dict[str, Any], config: Any, folder: Path) -> None:
    """Refuse a configuration with a key that looks as if it changed the model, and that the model never reads.

    Parameters
    ----------
    raw : dict
        What config.json holds.
    config : transformers.PretrainedConfig
        What transformers made of it; one whose class a folder brought itself is believed.

    Raises
    ------
    ModelError
    """
    if raw.get("transformers_weights"):
        raise ModelError(f"{folder / 'config.json'} has transformers_weights; allowed: weights in their usual files")
    if not type(config).__module__.startswith("transformers."):
        return
    parts = [(raw, config)]
    if isinstance(raw.get("text_config"), dict) and config.get_text_config() is not config:
        parts.append((raw["text_config"], config.get_text_config()))
    for values, made in parts:
        source = _source(made)
        known = _attributes(type(made)) | HARMLESS | ELSEWHERE | _of_generation()
        for key, found in values.items():
            if key in known or hasattr(made, REPLACED.get(key, "")) or _is_nothing(key, found):
                continue
            if not COMPUTES.search(key) or _reads(source, key) or is_published(key, found, made):
                continue
            raise ModelError(
                f"{folder / 'config.json'} has {key} = {_short(found)}, which a {made.model_type} model of "
                "transformers does not compute; allowed: a configuration whose keys are all applied"
            )
        _check_rope(getattr(made, "rope_parameters", None), source, folder)


def _check_rope(rope: Any, source: str, folder: Path) -> None:
    if not isinstance(rope, dict):
        return
    if rope and all(isinstance(part, dict) for part in rope.values()):
        for part in rope.values():
            _check_rope(part, source, folder)
        return
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE:
        raise ModelError(
            f"{folder / 'config.json'} scales its rotary embedding by {kind!r}; allowed: {', '.join(sorted(ROPE))}"
        )
    for key, found in rope.items():
        if key in ROPE[kind] | ROPE_ALWAYS or found is None or (key == "factor" and found == 1):
            continue
        if key in ROPE_ANY or not _reads(source, key):
            raise ModelError(
                f"{folder / 'config.json'} has {key} = {_short(found)} for a rotary embedding of type {kind!r}, which "
                f"does not use it; allowed: {', '.join(sorted(ROPE[kind])) or 'rope_theta alone'}"
            )


def _is_nothing(key: str, found: Any) -> bool:
    """Whether a key has a value that leaves a model as it is without the key."""
    if found is None or found is False or found in ("", [], {}):
        return True
    is_number = isinstance(found, int | float) and not isinstance(found, bool)
    return is_number and (found == 0 or (found == 1 and re.search("scal|multiplier|factor|parallel", key) is not None))


def _short(found: Any) -> str:
    said = repr(found)
    return said if len(said) <= 60 else f"{said[:57]}..."


def _reads(source: str, key: str) -> bool:
    return re.search(rf"\b{re.escape(key)}\b", source) is not None


def _attributes(kind: type[Any]) -> set[str]:
    """What a configuration of this class has, whatever it is made from."""
    return set(vars(kind())) | set(kind.attribute_map)


def _source(config: Any) -> str:
    """The text of the model's own modules, in which every key is named that it reads."""
    from transformers import AutoModelForCausalLM

    found = AutoModelForCausalLM._model_mapping.get(type(config), None)
    classes = found if isinstance(found, tuple) else (found,)
    modules = {type(config).__module__} | {each.__module__ for each in classes if each is not None}
    return "\n".join(inspect.getsource(importlib.import_module(module)) for module in sorted(modules))


def _of_generation() -> set[str]:
    from transformers import GenerationConfig

    return set(GenerationConfig().to_dict()) | {"task_specific_params", "forced_bos_token_id", "decoder_start_token_id"}
