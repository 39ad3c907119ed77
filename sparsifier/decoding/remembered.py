"""Keeps what was measured on a GPU in the user's cache, so that the next process need not measure it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from platformdirs import user_cache_path

from resting.sparsifier.files import replacing

FILE = "kernels.json"


def remembered(kind: str, what: str, device: torch.device, measure: Callable[[], Any]) -> Any:
    """Gives what was measured earlier with this GPU, driver, torch, Triton and code of kernels; else measures it.

    Parameters
    ----------
    kind, what : str
        Names of what is measured, such as ``layout``, and of what for.
    device : torch.device
        On a CPU nothing is kept.
    measure : callable
        Gives what JSON can hold.
    """
    if device.type != "cuda":
        return measure()
    file, where = cache_folder() / FILE, _where(device)
    known = _read(file).get(where, {}).get(f"{kind} {what}")
    if known is not None:
        return known
    found = measure()
    # A cache that cannot be written to costs the next process a moment.
    with suppress(OSError), FileLock(file.with_suffix(".lock"), timeout=10):
        content = _read(file)
        content.setdefault(where, {})[f"{kind} {what}"] = found
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return found


def cache_folder() -> Path:
    folder = Path(os.environ.get("RESTING_CACHE") or user_cache_path("resting-neurons"))
    with suppress(OSError):  # as where it cannot be written to
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def _read(file: Path) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    whole = isinstance(content, dict) and all(isinstance(of, dict) for of in content.values())
    return content if whole else {}


@cache
def _where(device: torch.device) -> str:
    """Names all that a time on a GPU depends on."""
    import triton

    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: 0)()
    code = hashlib.sha256()
    here = Path(__file__).parent
    patterns = "cuda_*.py", "cuda/*.py", "cuda/*.cu", "step/*.py"
    for file in sorted(file for pattern in patterns for file in here.glob(pattern)):
        code.update(file.read_bytes())
    gpu = torch.cuda.get_device_properties(device)
    versions = f"driver {driver}, torch {torch.__version__}, triton {triton.__version__}"
    return f"{gpu.name}, {gpu.multi_processor_count} multiprocessors, {versions}, code {code.hexdigest()[:12]}"
