"""Turns a GGUF file into a plain float32 model folder, once, in the cache."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from resting.benchmarks import cache
from resting.benchmarks.assets import gguf_checks, gguf_parts, model_checks
from resting.benchmarks.errors import AssetError, first_line

Say = Callable[[str], None]
"""Called with a sentence for the person who waits."""


def converted(path: Path, sha256: str, say: Say, provide: Callable[[], None] = lambda: None) -> tuple[Path, str]:
    """Convert `path`, which `provide` puts there; again where the converted files have changed since.

    Returns
    -------
    Path
        A model folder in the cache.
    str
        The model's name as rows show it: what it is, and the quantisation its weights went through.

    Raises
    ------
    AssetError
        If the file cannot be dequantised.
    """
    folder = folder_of(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not model_checks.is_sealed(folder):
            if folder.exists() and not folder.is_dir():
                raise AssetError(f"{folder} is a file where a folder belongs: move it away")
            provide()
            say(f"dequantising {path.name} (once)")
            dequantise(path, folder)
        return folder, model_checks.read_json(folder / model_checks.SEAL)["name"]


def folder_of(sha256: str) -> Path:
    """Return the folder in the cache that a GGUF file with this hash is converted into."""
    return cache.root() / "models" / sha256[:16]


def dequantise(path: Path, folder: Path) -> None:
    """Write the GGUF as a plain float32 model folder; transformers reads it."""
    import gguf
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
    try:
        # transformers lists the folder of the file: give it one of its own.
        (temporary / "in").mkdir()
        whole = temporary / "in" / "model.gguf"
        gguf_parts.put_together(path, whole)
        reader = gguf.GGUFReader(whole)
        source = {"pretrained_model_name_or_path": whole.parent, "gguf_file": whole.name}
        model = _model(source, reader)
        tokenizer = AutoTokenizer.from_pretrained(**source)
        gguf_checks.check_tokenizer(tokenizer, reader)
        out = temporary / "out"
        tokenizer.save_pretrained(out)
        state = model.state_dict()
        if model.config.tie_word_embeddings:
            state.pop("lm_head.weight", None)
        save_file({k: v.contiguous().clone() for k, v in state.items()}, out / "model.safetensors", {"format": "pt"})
        config = {k: v for k, v in model.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
        config |= {"architectures": [type(model).__name__], "dtype": "float32"}
        (out / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
        model_checks.seal(out, {"name": _name(path, reader), "gguf": path.name})
        if folder.exists():  # of an older version, or changed since it was written
            os.replace(folder, temporary / "old")
        os.replace(out, folder)
    except Exception as error:
        said = first_line(error).replace(str(temporary / "in" / "model.gguf"), "it")
        raise AssetError(f"{path} cannot be dequantised: {said}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _model(source: dict[str, Any], reader: Any) -> Any:
    """The model with the settings that the file asks for, all its tensors and no other."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(**source)
    gguf_checks.complete(config, reader)
    gguf_checks.check_settings(config, reader)
    with torch.device("meta"):
        gguf_checks.check_tensors(AutoModelForCausalLM.from_config(config), reader)
    model, about = AutoModelForCausalLM.from_pretrained(
        **source, config=config, dtype=torch.float32, output_loading_info=True
    )
    model_checks.check_loading(model, about, "it")
    return model


def _name(path: Path, reader: Any) -> str:
    """Say what the weights are: the model's own name, and the quantisation they went through."""
    import gguf

    file_type = gguf_parts.value(reader, "general.file_type")
    kind = "quantised"
    if file_type is not None:
        kind = gguf.LlamaFileType(int(file_type)).name.removeprefix("MOSTLY_")
    stem = gguf_parts.stem_of(path).removesuffix(f".{kind}")
    return f"{stem} ({kind}, dequantised)"
