"""Names of models, devices and tables as parts of the names of files and folders."""

from __future__ import annotations

import re


def slug(text: str) -> str:
    """Turn `text` into lower-case words of letters and digits with a hyphen between them."""
    return re.sub(r"[\W_]+", "-", text.lower()).strip("-")


ACROSS = "across.csv"
"""File with the numbers of several results folders side by side, in a folder that holds no results of its own."""
RANDOM = "random"
"""What stands in the place of a hash for random weights in a published shape."""


def of_weights(sha256: str) -> str:
    """Name weights in twelve digits of their hash, as the column ``weights`` does."""
    return sha256[:12]


def with_weights(model: str, weights: str) -> str:
    """Add to a model's name what tells it from another one of that name: ``model@0123456789ab (Q4_1)``."""
    return f"{bare(model)}@{weights}{model.removeprefix(bare(model))}"


def bare(model: str) -> str:
    """Leave out what stands in brackets after a model's name: how it was quantised, and the format of its weights."""
    return model.split(" (")[0]


FORMAT = re.compile(r"(?: \(|, then )(int\d[\w-]*)\)$")


def short(model: str) -> str:
    """Leave out what stands in brackets after a model's name, but for the format that its weights were put into."""
    found = FORMAT.search(model)
    return bare(model) if found is None else f"{bare(model)} ({found[1]})"


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
