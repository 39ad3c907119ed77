"""Reads a suite file, and explains what is wrong with one."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from resting.benchmarks.cells.suite import (
    CalibrationConfig,
    EvaluationConfig,
    LatencyConfig,
    LatencyDeviceConfig,
    MethodConfig,
    PolicyConfig,
    Published,
    Source,
    Suite,
    TasksConfig,
    Tokens,
)
from resting.benchmarks.errors import SuiteError

FOLDER = Path(__file__).parents[1] / "suites"


def available() -> list[str]:
    """Return the names of the suites that come with the project."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load(spec: str) -> Suite:
    """Read the suite `spec`: a name, or the path of a TOML file.

    Raises
    ------
    SuiteError
        Naming the key, the value and what is allowed.
    """
    path = Path(spec) if spec.endswith(".toml") else FOLDER / f"{spec}.toml"
    if not path.is_file():
        raise SuiteError(f"there is no suite {spec!r}; allowed: {', '.join(available())}, or the path of a .toml file")
    try:
        return Suite.model_validate(tomllib.loads(path.read_text(encoding="utf-8-sig"))).beside(path.parent)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SuiteError(f"{path} is not TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise SuiteError(f"{path} is not UTF-8 text") from error
    except ValidationError as error:
        raise SuiteError(f"{path.name}: " + "; ".join(explained(e) for e in error.errors())) from None


def explained(error: Any) -> str:
    """Say what an error of the schema means: the key, the value and what is allowed."""
    key = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown key {key!r}; allowed here: {', '.join(_siblings(error['loc']))}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    message = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "value_error":  # the message names the value
        return f"{key}: {message}" if key else message
    return f"{key} = {error['input']!r}: {message}"


def _siblings(location: tuple[str | int, ...]) -> list[str]:
    table: Any = Suite
    tables = {
        "tokens": Tokens,
        "calibration": CalibrationConfig,
        "evaluation": EvaluationConfig,
        "tasks": TasksConfig,
        "latency": LatencyConfig,
        "cpu": LatencyDeviceConfig,
        "cuda": LatencyDeviceConfig,
        "methods": MethodConfig,
        "policies": PolicyConfig,
        "published": Published,
        "sources": Source,
    }
    for part in location[:-1]:
        table = tables.get(str(part), table)
    return list(table.model_fields)
