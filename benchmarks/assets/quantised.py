"""Says which quantised checkpoints are loaded as plain numbers, and refuses the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from resting.benchmarks.errors import ModelError

DEQUANTISED = {"fp8": "FP8", "mxfp4": "MXFP4"}
"""Methods whose weights transformers turns into plain numbers, with the word that rows show."""


def kind_of(raw: dict[str, Any], folder: Path) -> str | None:
    """Return what the weights went through, in a word; None where the configuration speaks of no quantisation.

    Raises
    ------
    ModelError
        If the weights would stay codes in memory, or if nothing is known of the method.
    """
    found = raw.get("quantization_config") or (raw.get("text_config") or {}).get("quantization_config")
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found
    if method not in DEQUANTISED:
        raise ModelError(
            f"{folder} is quantised by {method!r} (quantization_config in its config.json); "
            f"allowed: {', '.join(sorted(DEQUANTISED))}, which is dequantised, or plain weights"
        )
    return DEQUANTISED[method]


def dequantising(kind: str | None) -> dict[str, Any]:
    """Return the arguments with which transformers dequantises weights of this kind on every device."""
    if kind is None:
        return {}
    from transformers import FineGrainedFP8Config, Mxfp4Config

    config = Mxfp4Config if kind == DEQUANTISED["mxfp4"] else FineGrainedFP8Config
    return {"quantization_config": config(dequantize=True)}
