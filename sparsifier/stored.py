"""Writes and reads the folder of a plan: plan.json and rules.safetensors."""

from __future__ import annotations

import json
from numbers import Real
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from resting.sparsifier.errors import PlanError
from resting.sparsifier.files import replacing_folder

FORMAT = 1
TYPES = {
    "method": str,
    "target": Real,
    "nominal": Real,
    "model": str,
    "calibration": str,
    "info": dict,
    "sites": list,
    "neurons": dict,
    "transform": dict,
}
"""Keys of plan.json beside its format."""
TRANSFORM = "transform"
"""Stands in the place of a site before the names of a transform's matrices."""
NAMED = {Real: "number", str: "text"}


def write(folder: Path, meta: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Writes `meta` and `tensors` (``site/field``) into `folder`, all or nothing.

    Raises
    ------
    PlanError
        If `meta` is not JSON, or `folder` holds something else than a plan.
    """
    if folder.exists() and not (folder / "plan.json").exists():
        raise PlanError(f"{folder} exists and is no plan: it is not overwritten")
    try:
        text = json.dumps(meta | {"format": FORMAT}, indent=1, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise PlanError(f"this plan cannot be saved: {error}; allowed: what JSON holds") from error
    with replacing_folder(folder) as temporary:
        save_file({k: t.clone() for k, t in tensors.items()}, temporary / "rules.safetensors")
        (temporary / "plan.json").write_text(text + "\n")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]]]:
    """Reads what `write` wrote.

    Returns
    -------
    meta : dict
        Without the sites.
    rules : dict of dict of Tensor
        By site and field, in the order of the sites; those of neuron masks too, and at the end a transform's matrices.
    """
    meta = _checked(json.loads((folder / "plan.json").read_text()))
    by_site: dict[str, dict[str, Tensor]] = {name: {} for name in (*meta.pop("sites"), *meta.get("neurons", {}))}
    if TRANSFORM in meta:
        by_site[TRANSFORM] = {}
    for key, tensor in load_file(folder / "rules.safetensors").items():
        site, name = key.split("/")
        if site not in by_site:
            raise PlanError(f"rules.safetensors has a rule at {site}, which plan.json does not list")
        by_site[site][name] = tensor
    return meta, by_site


def _checked(meta: dict[str, Any]) -> dict[str, Any]:
    """Gives what plan.json holds, without the format, where keys and types are those of a plan."""
    found = meta.pop("format")
    if found != FORMAT:
        if isinstance(found, int) and found > FORMAT:
            raise PlanError(f"its format is newer than {FORMAT}, namely {found}: update resting-neurons")
        raise PlanError(f"its format must be {FORMAT}, got {found!r}: fit the plan again")
    if unknown := sorted(meta.keys() - TYPES.keys()):
        raise PlanError(f"plan.json has a key {unknown[0]!r} that no plan has; allowed: {', '.join(TYPES)}")
    for name, kind in TYPES.items():
        if name in meta and not isinstance(meta[name], kind):
            raise PlanError(f"{name} in plan.json must be a {NAMED.get(kind, kind.__name__)}, got {meta[name]!r}")
    for name in ("target", "nominal"):
        if not 0.0 <= meta[name] <= 1.0:
            raise PlanError(f"{name} in plan.json must be in [0, 1], got {meta[name]}")
    return meta
