"""Models of published shapes with random weights: nothing is downloaded, and as much is read as of the real one."""

from __future__ import annotations

import tomllib
from functools import cache as memoise
from importlib import resources
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from resting.benchmarks.errors import SuiteError
from resting.sparsifier.low_rank import Algorithm, Factors

FILE = "shapes.toml"


@memoise
def shapes() -> dict[str, dict[str, Any]]:
    """Read the configurations in ``assets/shapes.toml``, by the short names that suites use."""
    return {name: entry["config"] for name, entry in _entries().items()}


@memoise
def shapes_by_hub_id() -> dict[str, dict[str, Any]]:
    """Read the same configurations by hub id; shapes that are on no hub are left out."""
    return {hub: entry["config"] for entry in _entries().values() for hub in _ids(entry.get("hub", []))}


def _ids(hub: str | list[str]) -> list[str]:
    return [hub] if isinstance(hub, str) else hub


def config_of(name: str, **changes: Any) -> Any:
    """Make the configuration of the shape `name`, with `changes` in place of the shape's own values.

    Raises
    ------
    SuiteError
        If the shape is not known.
    """
    if name not in shapes():
        raise SuiteError(f"unknown shape {name!r}; allowed: {', '.join(shapes())}")
    return AutoConfig.for_model(**{"model_type": "llama", "max_position_embeddings": 4096} | shapes()[name] | changes)


def random_model(name: str, dtype: torch.dtype, device: str = "cpu", **changes: Any) -> Any:
    """Build a model of the shape `name` with seeded random weights, in evaluation mode.

    Parameters
    ----------
    name : str
    dtype : torch.dtype
    device : str
    **changes
        Values of the configuration in place of the shape's own, for tests: fewer layers, say.

    Raises
    ------
    SuiteError
        If the shape is not known.
    """
    config = config_of(name, **changes)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


class RandomFactors(Factors):
    """Draws the low-rank parts of random weights, since decompositions would take longer than what is timed."""

    def low_rank(self, weight: Tensor, rank: int, algorithm: Algorithm = "exact") -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(rank)
        out, inputs = weight.shape
        u, v = (torch.randn(shape, generator=generator) / 100 for shape in ((out, rank), (rank, inputs)))
        return u, v


def name_of(shape: str) -> str:
    """Say in a row's words that the weights of a model are random."""
    return f"{shape} shape (random weights)"


def _entries() -> dict[str, dict[str, Any]]:
    text = resources.files("resting.benchmarks.assets").joinpath(FILE).read_text(encoding="utf-8")
    return tomllib.loads(text)
