"""Runs lm-eval's own command line, which then knows the model ``resting``.

lm-eval (0.4.13) has no entry points for models from outside, so one is registered before its command begins.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from resting.benchmarks.errors import BenchmarkError, first_line
from resting.sparsifier import SparsifierError

TARGET = "resting.benchmarks.using.lm_eval_model:PlanLM"


def register() -> None:
    """Make ``resting`` a model that lm-eval knows; what it needs is imported when it is asked for."""
    import lm_eval.models  # noqa: F401  # with lm-eval's own models, which it adds to an empty registry only
    from lm_eval.api.registry import model_registry

    if "resting" not in model_registry:
        model_registry.register("resting", target=TARGET)


def run(arguments: Sequence[str]) -> None:
    """Hand `arguments` to ``lm-eval``.

    Without a GPU, ``--device cpu`` is added where no device is named: lm-eval's own default is the first GPU.

    Raises
    ------
    BenchmarkError
        If lm-eval finds fault with what it is asked.
    """
    from lm_eval.__main__ import cli_evaluate

    register()
    given = list(arguments)
    is_run = bool(given) and given[0] not in ("ls", "validate", "-h", "--help")
    named = any(one.split("=")[0] in ("--device", "--config", "-C") for one in given)
    if is_run and len(given) > 1 and not named and not torch.cuda.is_available():
        given += ["--device", "cpu"]
    before, sys.argv = sys.argv, ["lm-eval", *given]
    try:
        cli_evaluate()
    except SparsifierError:
        raise
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise BenchmarkError(f"lm-eval: {first_line(error)}") from error
    finally:
        sys.argv = before
