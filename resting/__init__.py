"""Offers one interface to activation (input) sparsity in language models, published methods, and benchmarks.

What a method's author and a user need is importable from here, and is loaded on first use: the names of
``resting.sparsifier``, `decoding`, `fit`, and every method class of ``resting.baselines`` and ``resting.method``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resting.baselines.cats import Cats
    from resting.baselines.chess import Chess
    from resting.baselines.clusters import Clusters
    from resting.baselines.countdown import CountdownM
    from resting.baselines.dense import Dense
    from resting.baselines.griffin import Griffin
    from resting.baselines.larosa import LaRoSA
    from resting.baselines.lsq import LeastSquares
    from resting.baselines.max_p import MaxP
    from resting.baselines.oracle import Oracle
    from resting.baselines.proxy import Proxy
    from resting.baselines.rotation_global import RotationGlobal
    from resting.baselines.rotation_heads import RotationHeads
    from resting.baselines.rsparse import RSparse
    from resting.baselines.scap import Scap
    from resting.baselines.scap_channel import ScapChannel
    from resting.baselines.static import Static
    from resting.baselines.static_neurons import StaticNeurons
    from resting.baselines.statistical import Statistical
    from resting.baselines.teal import Teal
    from resting.baselines.teal_folded import TealFolded
    from resting.baselines.top_p import TopP
    from resting.baselines.var import Var
    from resting.baselines.was import Was
    from resting.baselines.wina import Wina
    from resting.baselines.wina_rotated import WinaRotated
    from resting.benchmarks.fitting.fit import fit
    from resting.method.controls import RandomDirection
    from resting.method.fisher import FisherError
    from resting.method.mean_error import MeanError
    from resting.method.spontaneous import Spontaneous
    from resting.sparsifier import *
    from resting.sparsifier.decoding import decoding

METHODS = ("resting.baselines", "resting.method")
"""Packages whose method classes are importable from here."""
FUNCTIONS = {"decoding": "resting.sparsifier.decoding", "fit": "resting.benchmarks.fitting.fit"}
"""Functions that are importable from here, with the modules that they are in."""


def __getattr__(name: str) -> Any:
    """Loads a public name on its first use."""
    if name in FUNCTIONS:
        return getattr(importlib.import_module(FUNCTIONS[name]), name)
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is None:
        interface = importlib.import_module("resting.sparsifier")
        if name in interface.__all__:
            return getattr(interface, name)
        if name[:1].isupper():
            for module in _method_modules():
                found = getattr(module, name, None)
                if isinstance(found, type) and found.__module__ == module.__name__ and hasattr(found, "rule"):
                    return found
    raise AttributeError(f"module 'resting' has no attribute {name!r}")


def _method_modules() -> Any:
    for package in METHODS:
        for info in pkgutil.iter_modules(importlib.import_module(package).__path__, f"{package}."):
            yield importlib.import_module(info.name)
