"""Says which command measures a results folder again."""

from __future__ import annotations

import shlex
from typing import Any

from resting.benchmarks.cells import suite_file


def command(facts: dict[str, Any], folder: str = "") -> str:
    """Write the command after what provenance.json holds.

    A suite that is no part of the project is its file, whose path is not known; a suite that was changed on the command
    line is the one that it was made of, with the choices.

    Parameters
    ----------
    facts : dict
    folder : str
        Name of the results folder, which holds the model's where the command named one, and ends in a study's.
    """
    suite, study = facts["suite"], facts.get("study")
    changed = suite.get("changed") or {}
    name = changed.get("suite", suite["name"])
    words = [
        "resting",
        *(["study", study] if study else ["run"]),
        name if name in suite_file.available() else f"{name}.toml",
    ]
    for key, value in changed.get("choices", {}).items():
        if key == "text":
            words += [word for text in value for word in ("--text", f"{text}={suite['sources'][text]['where']}")]
        else:
            words += [f"--{key}", _written(key, value)]
    if changed and not suite["name"].startswith(f"{name}-changed-"):
        words += ["--name", suite["name"]]
    if (own := folder.removesuffix(f"-{study}")).startswith(f"{suite['name']}-"):
        words += _of_folder(own.removeprefix(f"{suite['name']}-"))
    machines = facts.get("machines") or [facts.get("measured_on", {})]
    devices = [machine.get("device", "cpu") for machine in machines]
    if any(device != "cpu" for device in devices):
        words += ["--device", "auto" if any(", " in device for device in devices) else "cuda"]  # one model on several
    return shlex.join(words)


def _written(key: str, value: Any) -> str:
    if not isinstance(value, list):
        return str(value)
    if key == "seeds" and value == list(range(len(value))):
        return str(len(value))
    return ",".join(map(str, value))


def _of_folder(end: str) -> list[str]:
    """What the command named beside the suite: a dtype, a model, or both."""
    model, _, dtype = end.rpartition("-")
    known = dtype in ("float32", "bfloat16")
    return (["--model", "MODEL"] if model or not known else []) + (["--dtype", dtype] if known else [])
