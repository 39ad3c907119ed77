"""Names of models, devices and tables as parts of the names of files and folders."""

from __future__ import annotations

import re


def slug(text: str) -> str:
    """Turn `text` into lower-case words of letters and digits with a hyphen between them."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


RANDOM = "random"
"""What stands in the place of a hash for random weights in a published shape."""


def of_weights(sha256: str) -> str:
    """Name weights in twelve digits of their hash, as the column ``weights`` does."""
    return sha256[:12]


def with_weights(model: str, weights: str) -> str:
    """Add to a model's name what tells it from another one of that name: ``model@0123456789ab (Q4_1)``."""
    return f"{short(model)}@{weights}{model.removeprefix(short(model))}"


def short(model: str) -> str:
    """Leave out what stands in brackets after a model's name, such as how it was quantised."""
    return model.split(" (")[0]


def with_format(model: str, form: str) -> str:
    """Add a weight format to a model's name: ``model (Q4_1, dequantised, then int4-g64)``."""
    return f"{model[:-1]}, then {form})" if model.endswith(")") else f"{model} ({form})"


def without_format(model: str, form: str) -> str:
    """Take away from a model's name what `with_format` added; nothing where it added nothing."""
    if model.endswith(f", then {form})"):
        return f"{model.removesuffix(f', then {form})')})"
    return model.removesuffix(f" ({form})")


def of_device(device: str) -> str:
    """Name a GPU in a word or two: ``NVIDIA H200 141GB HBM3e`` becomes ``h200``."""
    words = slug(device).split("-")
    end = next((i for i, word in enumerate(words) if re.fullmatch(r"\d+gb", word)), len(words))
    return "-".join(word for word in words[:end] if word not in ("", "nvidia", "tesla")) or "gpu"
