"""Reads the headers of a folder's weights, and refuses files that are not, or not wholly, what would be loaded."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from resting.benchmarks.errors import ModelError, first_line

PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
"""Types of tensors that are weights as they stand."""
CODES = {"FP8": ("F8_E4M3", "", "_scale_inv"), "MXFP4": ("U8", "_blocks", "_scales")}
"""Type of the codes of each method whose weights are dequantised, and the ends of the names of codes and scales."""
FREQUENCIES = "rotary_emb.inv_freq"
COUNTERS = ("position_ids", "num_batches_tracked")
"""Ends of the names of whole numbers that old checkpoints hold beside their weights."""
SAME_AGAIN = ("consolidated",)
"""Beginnings of the names of files with the same weights in their author's own format, which nothing here reads."""
OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
LARGEST_HEADER = 1 << 28


def check(folder: Path, quantised: str | None, say: Callable[[str], None]) -> None:
    """Refuse weights of which a part would not be loaded, or would be loaded as other numbers than they stand for.

    Parameters
    ----------
    folder : Path
    quantised : str or None
        What the weights went through, where the configuration says so (`quantised.kind_of`).
    say : callable

    Raises
    ------
    ModelError
        If there is an adapter, a second set of weights, a tensor twice, or a tensor of codes without an explanation.
    """
    for name in ADAPTERS:
        if (folder / name).exists():
            raise ModelError(f"{folder} holds an adapter ({name}); allowed: a model that it is merged into")
    read = _read_by_transformers(folder)
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in read and not file.name.startswith(SAME_AGAIN):
            raise ModelError(
                f"{folder} holds {file.name} beside {' and '.join(sorted(read)[:2])}; allowed: one set of weights"
            )
    seen: dict[str, str] = {}
    kinds: dict[str, str] = {}
    for name in sorted(read):
        for tensor, about in _header(folder / name).items():
            if tensor in seen:
                raise ModelError(f"{folder} has the weights {tensor} twice, in {seen[tensor]} and in {name}")
            seen[tensor] = name
            kinds[tensor] = about["dtype"]
    for tensor, kind in kinds.items():
        if kind in PLAIN or tensor.endswith(COUNTERS):
            continue
        code, ending, scales = CODES.get(quantised or "", ("", "", ""))
        if kind == code and quantised == "MXFP4" and tensor.endswith(scales):
            continue  # of codes, which are asked for them
        if kind != code or not tensor.endswith(ending):
            raise ModelError(
                f"{folder} has the weights {tensor} as {kind}, and its config.json does not say what they stand for; "
                f"allowed: {', '.join(sorted(PLAIN))}"
            )
        if (wanted := tensor.removesuffix(ending) + scales) not in kinds:
            raise ModelError(f"{folder} has the weights {tensor} as {kind} without their scales, {wanted}")
    others = sorted({file.name for pattern in OTHER_FORMATS for file in folder.glob(pattern)})
    if others:
        say(f"{', '.join(others)} in {folder.name} is not read: weights come from safetensors files")


def check_frequencies(model: Any, folder: Path) -> None:
    """Refuse stored frequencies of the rotary embedding, which transformers ignores, that are not the model's.

    Raises
    ------
    ModelError
    """
    own = [buffer.float().cpu() for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    for name in sorted(_read_by_transformers(folder)):
        for tensor in _header(folder / name):
            if not tensor.endswith(FREQUENCIES):
                continue
            with safe_open(folder / name, framework="pt") as source:
                found = source.get_tensor(tensor).float()
            if not any(found.shape == each.shape and torch.allclose(found, each, rtol=1e-2) for each in own):
                raise ModelError(f"{folder} stores frequencies in {tensor} that its config.json does not ask for")


def are_rounded(folder: Path, dtype: torch.dtype) -> bool:
    """Tell whether weights lose digits when they are loaded in `dtype`; what is loaded in float32 is said not to."""
    kinds = {torch.bfloat16: "BF16", torch.float16: "F16"}
    if dtype not in kinds:
        return False
    names = _read_by_transformers(folder)
    return any(about["dtype"] in PLAIN - {kinds[dtype]} for name in names for about in _header(folder / name).values())


def _read_by_transformers(folder: Path) -> set[str]:
    """The files that `from_pretrained` takes: the one file, or those of the index."""
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors"}
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} has no model.safetensors and no {index.name}; allowed: one of them, as transformers writes them"
        )
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights; allowed: what transformers writes") from error
    for name in sorted(map(str, files)):
        if Path(name).name != name or not (folder / name).is_file():
            raise ModelError(f"{index} names {name}, which is not in {folder}")
    return {str(name) for name in files}


def _header(file: Path) -> dict[str, dict[str, Any]]:
    """Names, types and places of the tensors of a safetensors file."""
    try:
        with file.open("rb") as source:
            (length,) = struct.unpack("<Q", source.read(8))
            if length > LARGEST_HEADER:
                raise ValueError("its header is too long")
            found = json.loads(source.read(length), object_pairs_hook=_once)
        tensors = {name: about for name, about in found.items() if name != "__metadata__"}
        end = max((about["data_offsets"][1] for about in tensors.values()), default=0)
        if any(not isinstance(about["dtype"], str) for about in tensors.values()):
            raise ValueError("its header has a tensor without a type")
        if file.stat().st_size != 8 + length + end:
            raise ModelError(f"{file} is cut short, or longer than it says; allowed: {8 + length + end} bytes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, struct.error) as error:
        raise ModelError(f"{file} is no safetensors file: {first_line(error)}") from error
    return tensors


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(set(names)) != len(names):
        raise ValueError("a name stands in it twice")
    return dict(pairs)
