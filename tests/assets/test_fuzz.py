"""Whatever is changed in a model's files: the logits are the right ones, or the model is refused; nothing else.

A change says what must come of it where that is known: `LOADS`, `REFUSED`, or `EITHER`. What loads is compared with
transformers on the same folder, or with a llama that is built by hand from the tensors of the same GGUF.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import gguf
import numpy as np
import pytest
import tiny
import torch
from families import build
from gguf_files import expected, in_parts, logits, settings_of, tensors_of, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from resting.benchmarks.assets import models
from resting.benchmarks.errors import AssetError, ModelError

LOADS, REFUSED, EITHER = "loads", "refused", "either"
FIXED = settings(
    max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
NUMBERS = st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 48, 64, 97, 128, -1, 0.5, 1.5, 1e-5, 1e4, 5e5])
TYPES = {
    torch.float64: EITHER,
    torch.float16: EITHER,
    torch.bfloat16: EITHER,
    torch.int8: REFUSED,
    torch.int32: REFUSED,
    torch.float8_e4m3fn: REFUSED,
}


@dataclass
class Folder:
    """A model folder that is not written yet."""

    tensors: dict[str, torch.Tensor]
    config: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    others: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    shards: str = ""
    cut: int = 0

    def write(self, folder: Path) -> None:
        tiny.tokenizer().save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, text in self.files.items():
            (folder / name).write_text(text)
        for name, tensors in self.others.items():
            save_file(tensors, folder / name, {"format": "pt"})
        tensors = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        file = folder / "model.safetensors"
        if self.shards:
            files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
            halves = [dict(list(tensors.items())[n::2]) for n in (0, 1)]
            if self.shards == "twice":
                halves[1] |= dict(list(halves[0].items())[:1])
            for name, half in zip(files, halves):
                save_file(half, folder / name, {"format": "pt"})
            names = {key: name for name, half in zip(files, halves) for key in half}
            if self.shards == "lost":
                names = {key: name.replace("2-of", "3-of") for key, name in names.items()}
            index = {"metadata": {}, "weight_map": names}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
            file = folder / files[0]
        else:
            save_file(tensors, file, {"format": "pt"})
        if self.cut:
            data = file.read_bytes()
            file.write_bytes(data[: -self.cut] if self.cut > 0 else data + b"x" * -self.cut)


Change = tuple[str, Callable[[Any], object]]
FAMILY_TENSORS = {family: build(family).state_dict() for family in ("llama", "qwen2")}
CONFIGS = {family: build(family).config.to_dict() for family in FAMILY_TENSORS}
COMMON = sorted(set.intersection(*(set(tensors) for tensors in FAMILY_TENSORS.values())))


def _with(name: str, act: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Folder], object]:
    return lambda f: f.tensors.update({name: act(f.tensors[name])}) if name in f.tensors else None


@st.composite
def changes_of_a_folder(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(COMMON))
    kind = draw(st.sampled_from(sorted(FOLDER_CHANGES)))
    return FOLDER_CHANGES[kind](draw, name)


def _cut(draw: st.DrawFn, sizes: list[int]) -> Callable[[Any], object]:
    size = draw(st.sampled_from(sizes))
    return lambda f: setattr(f, "cut", size)


def _rename(name: str) -> Callable[[Any], object]:
    return lambda f: f.tensors.update({f"{name}_2": f.tensors.pop(name, next(iter(f.tensors.values())))})


def _retype(draw: st.DrawFn, name: str) -> Change:
    kind = draw(st.sampled_from(list(TYPES)))
    return TYPES[kind], _with(name, lambda tensor: tensor.to(kind))


def _rescale(draw: st.DrawFn, name: str) -> Change:
    factor = draw(st.sampled_from([0.0, 1e-3, -1.0, 972.0, float("inf")]))
    return REFUSED if factor == float("inf") else EITHER, _with(name, lambda tensor: tensor * factor)


def _beside(draw: st.DrawFn, name: str) -> Change:
    end = draw(st.sampled_from(["_scale", "_scale_inv", "_zero_point", ".bias", ".lora_A.weight"]))
    return REFUSED, lambda f: f.tensors.update({f"{name}{end}": torch.ones(3)})


def _number(draw: st.DrawFn, name: str) -> Change:
    known = [key for key, value in CONFIGS["llama"].items() if isinstance(value, int | float)]
    key, value = draw(st.sampled_from(sorted(known))), draw(NUMBERS)
    return EITHER, lambda f: f.config.update({key: value})


def _forget(draw: st.DrawFn, name: str) -> Change:
    key = draw(st.sampled_from(sorted(CONFIGS["llama"])))
    return EITHER, lambda f: f.config.pop(key, None)


def _unknown(draw: st.DrawFn, name: str) -> Change:
    key = draw(st.sampled_from(["attn_logit_softcapping", "logit_scale", "use_qk_norm_x", "expert_bias"]))
    return REFUSED, lambda f: f.config.update({key: 2.0})


def _rope(draw: st.DrawFn, name: str) -> Change:
    kind = draw(st.sampled_from(["linear", "dynamic", "yarn", "llama3", "weird", "default"]))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([1e4, 5e5]))}
    rope |= {} if kind == "default" else {"factor": draw(st.sampled_from([2.0, 8.0]))}
    if draw(st.booleans()):
        rope["original_max_position_embeddings"] = 16
    return REFUSED if kind == "weird" else EITHER, lambda f: f.config.update(rope_parameters=rope)


def _added(draw: st.DrawFn, name: str) -> Change:
    files = {"generation_config.json": LOADS, "notes.txt": LOADS, "adapter_config.json": REFUSED}
    file = draw(st.sampled_from(sorted(files)))
    return files[file], lambda f: f.files.update({file: "{}"})


def _second_set(draw: st.DrawFn, name: str) -> Change:
    file = draw(st.sampled_from(["model-00001-of-00009.safetensors", "adapter_model.safetensors", "x.safetensors"]))
    return REFUSED, lambda f: f.others.update({file: {name: torch.zeros(2)}})


def _shards(draw: st.DrawFn, name: str) -> Change:
    kind = draw(st.sampled_from(["whole", "twice", "lost"]))
    return EITHER if kind == "whole" else REFUSED, lambda f: setattr(f, "shards", kind)


FOLDER_CHANGES: dict[str, Callable[[st.DrawFn, str], Change]] = {
    "nothing": lambda draw, name: (LOADS, lambda f: None),
    "drop": lambda draw, name: (REFUSED, lambda f: f.tensors.pop(name, None)),
    "rename": lambda draw, name: (
        REFUSED,
        lambda f: f.tensors.update({f"{name}_2": f.tensors.pop(name, torch.ones(2))}),
    ),
    "turn": lambda draw, name: (EITHER, _with(name, lambda tensor: tensor.flip(0))),
    "reshape": lambda draw, name: (EITHER, _with(name, lambda tensor: tensor.reshape(-1))),
    "transpose": lambda draw, name: (EITHER, _with(name, lambda tensor: tensor.T if tensor.dim() == 2 else tensor)),
    "cut": lambda draw, name: (REFUSED, _cut(draw, [1, 500, 10**6, -8])),
    "tie": lambda draw, name: (REFUSED, lambda f: f.config.update(tie_word_embeddings=True)),
    "quantised": lambda draw, name: (REFUSED, lambda f: f.config.update(quantization_config={"quant_method": "x"})),
    "retype": _retype,
    "rescale": _rescale,
    "beside": _beside,
    "number": _number,
    "forget": _forget,
    "unknown": _unknown,
    "rope": _rope,
    "added": _added,
    "second set": _second_set,
    "shards": _shards,
}


def verdict(changes: list[Change]) -> str:
    """What must come of the changes; one of two may undo the other."""
    return changes[0][0] if len(changes) == 1 else EITHER


def numbers(load: Callable[[], Any]) -> torch.Tensor | None:
    """Logits of what is loaded; None where they cannot be computed, which is no number either."""
    model = load()
    try:
        return logits(model)
    except Exception:
        return None


def judged(path: Path, must: str, right: Callable[[], torch.Tensor | None]) -> None:
    """Compare what `path` gives with what is right, or see it refused."""
    try:
        ours = numbers(lambda: models.resolve(str(path)).load(torch.float32))
    except (ModelError, AssetError):
        assert must != LOADS
        return
    assert must != REFUSED
    theirs = right()
    assert (ours is None) == (theirs is None)
    if ours is not None and theirs is not None:
        size = float(theirs.nan_to_num(0, 0, 0).abs().max())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * max(size, 1e-3), equal_nan=True)


@FIXED
@given(st.sampled_from(sorted(CONFIGS)), st.lists(changes_of_a_folder(), min_size=1, max_size=2))
def test_a_folder_gives_the_logits_of_transformers_or_is_refused(family, changes):
    made = Folder(dict(FAMILY_TENSORS[family]), json.loads(json.dumps(CONFIGS[family])))
    for _, act in changes:
        act(made)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        made.write(folder)

        def right() -> torch.Tensor | None:
            model, about = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            assert not any(about.values())
            return numbers(lambda: model)

        judged(folder, verdict(changes), right)


@dataclass
class File:
    """A GGUF that is not written yet."""

    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]
    kinds: dict[str, gguf.GGMLQuantizationType] = field(default_factory=dict)
    cut: int = 0
    parts: int = 1
    lost: int | None = None

    def write(self, path: Path) -> Path:
        write(path, self.tensors, self.settings, kinds=self.kinds)
        if self.cut:
            path.write_bytes(path.read_bytes()[: -self.cut])
        if self.parts == 1:
            return path
        parts = in_parts(path, self.parts)
        if self.lost is not None:
            parts.pop(self.lost).unlink()
        return parts[0]


LLAMA = tensors_of("llama")
GGUF_NAMES = sorted(LLAMA)
KINDS = [gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1")]


def _g_with(name: str, act: Callable[[np.ndarray], np.ndarray]) -> Callable[[File], object]:
    return lambda f: f.tensors.update({name: act(f.tensors[name])}) if name in f.tensors else None


def _g_rescale(draw: st.DrawFn, name: str) -> Change:
    factor = draw(st.sampled_from([0.0, 1e-3, -1.0, 972.0, float("inf")]))
    return REFUSED if factor == float("inf") else EITHER, _g_with(name, lambda array: array * factor)


def _g_retype(draw: st.DrawFn, name: str) -> Change:
    kind = draw(st.sampled_from(KINDS))
    matrix = LLAMA[name].ndim == 2 and LLAMA[name].shape[1] % 32 == 0
    return LOADS, lambda f: f.kinds.update({name: kind if matrix else gguf.GGMLQuantizationType.F16})


def _g_beside(draw: st.DrawFn, name: str) -> Change:
    other = draw(st.sampled_from([name.replace("weight", "bias"), name.replace("weight", "scale"), "rope_long.weight"]))
    return REFUSED, lambda f: f.tensors.update({other: np.ones(32, np.float32)})


def _g_number(draw: st.DrawFn, name: str) -> Change:
    keys = [key.removeprefix("llama.") for key in settings_of("llama")]
    keys += ["attention.key_length", "attention.value_length", "rope.dimension_count", "rope.scaling.factor"]
    keys += ["expert_count", "attention.sliding_window", "logit_scale", "attn_logit_softcapping", "something.new"]
    key, value = draw(st.sampled_from(keys)), draw(NUMBERS)
    is_float = any(word in key for word in ("eps", "base", "factor", "scale", "cap"))
    return EITHER, lambda f: f.settings.update({f"llama.{key}": float(value) if is_float else int(max(value, 0))})


def _g_forget(draw: st.DrawFn, name: str) -> Change:
    key = draw(st.sampled_from(sorted(settings_of("llama"))))
    return EITHER, lambda f: f.settings.pop(key, None)


def _g_rope(draw: st.DrawFn, name: str) -> Change:
    kind = draw(st.sampled_from(["linear", "none", "longrope", "su"]))
    factor = draw(st.sampled_from([1.0, 2.0, 8.0]))
    scaling = {"llama.rope.scaling.type": kind, "llama.rope.scaling.factor": factor}
    return EITHER, lambda f: f.settings.update(scaling)


def _g_factors(draw: st.DrawFn, name: str) -> Change:
    factors = draw(st.sampled_from([[1.0] * 4, [1.0, 1.0, 1.0, 4.6996], [1.0, 2.0, 4.0, 8.0], [8.0] * 4, [1.0] * 3]))
    return EITHER, lambda f: f.tensors.update({"rope_freqs.weight": np.array(factors, np.float32)})


def _g_parts(draw: st.DrawFn, name: str) -> Change:
    count, is_lost = draw(st.sampled_from([2, 3])), draw(st.booleans())
    lost = count - 1 if is_lost else None

    def act(file: File) -> None:
        file.parts, file.lost = count, lost

    return REFUSED if is_lost else EITHER, act


GGUF_CHANGES: dict[str, Callable[[st.DrawFn, str], Change]] = {
    "nothing": lambda draw, name: (LOADS, lambda f: None),
    "untie": lambda draw, name: (EITHER, lambda f: f.tensors.pop("output.weight", None)),
    "drop": lambda draw, name: (REFUSED if name != "output.weight" else EITHER, lambda f: f.tensors.pop(name, None)),
    "rename": lambda draw, name: (REFUSED, _rename(name)),
    "turn": lambda draw, name: (EITHER, _g_with(name, lambda array: array[::-1].copy())),
    "reshape": lambda draw, name: (EITHER, _g_with(name, lambda array: array.reshape(-1, 16))),
    "cut": lambda draw, name: (EITHER, _cut(draw, [1, 40, 500, 10**4])),
    "retype": _g_retype,
    "rescale": _g_rescale,
    "beside": _g_beside,
    "number": _g_number,
    "forget": _g_forget,
    "rope": _g_rope,
    "factors": _g_factors,
    "parts": _g_parts,
}


@st.composite
def changes_of_a_file(draw: st.DrawFn) -> Change:
    name = draw(st.sampled_from(GGUF_NAMES))
    return GGUF_CHANGES[draw(st.sampled_from(sorted(GGUF_CHANGES)))](draw, name)


@FIXED
@given(st.lists(changes_of_a_file(), min_size=1, max_size=2))
def test_a_gguf_gives_the_logits_of_its_tensors_or_is_refused(changes):
    made = File(dict(LLAMA), settings_of("llama"))
    for _, act in changes:
        act(made)
    with tempfile.TemporaryDirectory() as name, mock.patch.dict(os.environ, {"RESTING_CACHE": f"{name}/cache"}):
        whole = File(made.tensors, made.settings, made.kinds, made.cut)
        try:
            reference = whole.write(Path(name) / "right.gguf")
            path = made.write(Path(name) / "some.gguf")
        except (ValueError, OverflowError, IndexError, gguf.quants.QuantError):  # no such file can be written
            return
        judged(path, verdict(changes), lambda: expected(reference))


@pytest.mark.parametrize("kind", sorted(FOLDER_CHANGES) + sorted(GGUF_CHANGES))
def test_every_kind_of_change_is_tried(kind):
    assert callable(FOLDER_CHANGES.get(kind) or GGUF_CHANGES[kind])
